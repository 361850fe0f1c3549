// All components of every vector, weighted by its posteriors (Eqs. 6 and 9), on a CPU: posteriors, what they make of x,
// and weighted sums over a batch, each of which reads x once.
//
// A block of kLanes vectors at a time is laid feature after feature, so that registers hold different vectors and that
// features and positions may lie in either order. Tables are packed as they are walked.
//
// Legend: N samples, C features, L positions of a sample, K components. `in_rows`: a feature's positions lie together
// in x and y, (N, C, L), and a component's in log_tau, (N, K, L); else (N, L, C) and (N, L, K).

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "native_types.h"

namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16, kFeatures = 4;
#elif defined(__AVX__)
constexpr int kWidth = 8, kFeatures = 2;
#else
constexpr int kWidth = 4, kFeatures = 2;
#endif
constexpr int kComponents = 4;  // and kFeatures: as many sums as registers hold
constexpr int kLanes = 2 * kWidth;
constexpr int64_t kBlock = 16;  // features summed in one go, or that the nearest cache holds of a block of vectors
constexpr int64_t kSpan = 1024;  // vectors summed in one go, a multiple of kLanes
constexpr int kSums = 2;  // features whose sums are taken side by side

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));

struct Pair {  // of registers: one number of each vector of a block
    Floats low, high;
};

struct Components {
    const float *shift, *squared, *linear, *level, *reach;     // (C,), (C, K), (C, K), (K,), (): of their densities
    const float *center, *shared, *scales, *offsets, *factor;  // (C,), (C,), (K, C), (K, C), (K,): of their combination
    const float *weight, *bias;                                // (C,) each, or null
};

inline Floats all(float value) { return Floats{} + value; }

// e^x of x <= 0, to the last digit or so; 0 from -87 on, just before it is no normal number.
inline Floats exponential(Floats x) {
    const Floats magic = all(12582912.0f);  // 1.5 * 2^23: what is added to it is rounded to a whole number
    const Floats shifted = x * 1.44269504f + magic, whole = shifted - magic;
    const Floats rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Floats sum = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    const Floats power = (Floats)(((Ints)shifted - (Ints)magic + 127) << 23);
    return x < -87.0f ? Floats{} : sum * power;
}

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline Floats within(Floats x, float reach) {
    return x > reach ? all(reach) : x < -reach ? all(-reach) : x;
}

struct Sum {  // of however many numbers, to the last digit or so (Kahan)
    Floats total{}, excess{};

    void add(Floats x) {
        const Floats rest = x - excess, more = total + rest;
        excess = (more - total) - rest;
        total = more;
    }
};

// Rows of a (rows, lanes) block: `count` of them are there, from `offset` on in memory, `step` from row to row.
struct Lanes {
    int64_t offset[kLanes];
    int count;
    bool together;  // and one after another

    Lanes(int64_t first, int64_t vectors, int64_t rows, int64_t L, bool in_rows) {
        count = int(std::min<int64_t>(kLanes, vectors - first));
        for (int lane = 0; lane < count; ++lane) {
            const int64_t vector = first + lane;
            offset[lane] = in_rows ? vector / L * rows * L + vector % L : vector * rows;
        }
        together = in_rows && first % L + count <= L;
    }

    template <typename Visit>
    inline void each(int64_t rows, int64_t step, Visit visit) const {
        if (together) {
            for (int64_t row = 0; row < rows; ++row)
                for (int lane = 0; lane < count; ++lane) visit(row, lane, offset[0] + row * step + lane);
        } else {
            for (int64_t start = 0; start < rows; start += kBlock)
                for (int lane = 0; lane < count; ++lane)
                    for (int64_t row = start; row < std::min(rows, start + kBlock); ++row)
                        visit(row, lane, offset[lane] + row * step);
        }
    }
};

// Two tables (columns, rows) as [group of `wide` rows][column][first, second][row of the group].
std::vector<float> packed(const float* first, const float* second, int64_t rows, int64_t columns, int wide) {
    std::vector<float> table((rows + wide - 1) / wide * columns * 2 * wide);
    for (int64_t column = 0; column < columns; ++column)
        for (int64_t row = 0; row < rows; ++row) {
            float* to = &table[(row / wide * columns + column) * 2 * wide + row % wide];
            to[0] = first[column * rows + row];
            to[wide] = second[column * rows + row];
        }
    return table;
}

// Densities from tables of their expanded squares: -1/2 (scale x - offset)^2 + level, which cancels less.
struct Densities {
    std::vector<float> scale, offset, table;
    const float* level;

    Densities(const Components& of, int64_t C, int64_t K) : scale(C * K), offset(C * K), level(of.level) {
        for (int64_t i = 0; i < C * K; ++i) {
            scale[i] = std::sqrt(-2 * of.squared[i]);
            offset[i] = scale[i] > 0 ? of.linear[i] / scale[i] : 0;  // none of an infinite variance
        }
        table = packed(scale.data(), offset.data(), K, C, kComponents);
    }

    // Their logarithms at every vector of a block.
    void log(Pair* logs, const Pair* x, int64_t C, int64_t K) const {
        const float* at = table.data();
        for (int64_t first = 0; first < K; first += kComponents) {
            Pair total[kComponents] = {};
            for (int64_t start = 0; start < C; start += kBlock) {
                Pair sum[kComponents] = {};
                for (int64_t c = start; c < std::min(C, start + kBlock); ++c, at += 2 * kComponents) {
                    const Floats low = x[c].low, high = x[c].high;
                    for (int k = 0; k < kComponents; ++k) {
                        const Floats below = low * at[k] - at[kComponents + k];
                        const Floats above = high * at[k] - at[kComponents + k];
                        sum[k] = {sum[k].low + below * below, sum[k].high + above * above};
                    }
                }
                for (int k = 0; k < kComponents; ++k)
                    total[k] = {total[k].low + sum[k].low, total[k].high + sum[k].high};
            }
            for (int k = 0; k < kComponents && first + k < K; ++k)
                logs[first + k] = {level[first + k] - 0.5f * total[k].low, level[first + k] - 0.5f * total[k].high};
        }
    }
};

// Logarithms of densities become posteriors, or their logarithms.
template <typename Half>
void posteriors(Pair* logs, int64_t K, Half half, bool logarithms) {
    Floats peak = half(logs[0]);
    for (int64_t k = 1; k < K; ++k) peak = larger(half(logs[k]), peak);
    Sum sum;
    for (int64_t k = 0; k < K; ++k) {
        const Floats below = half(logs[k]) - peak, share = exponential(below);
        sum.add(share);
        half(logs[k]) = logarithms ? below : share;
    }
    Floats total = sum.total;
    if (logarithms)
        for (int lane = 0; lane < kWidth; ++lane) total[lane] = std::log(total[lane]);
    for (int64_t k = 0; k < K; ++k) half(logs[k]) = logarithms ? half(logs[k]) - total : half(logs[k]) / total;
}

// Vectors become the sums of their components, in place.
void combine(Pair* x, const Pair* coefficient, const float* table, const Components& of, int64_t C, int64_t K) {
    Sum low_sum, high_sum;
    for (int64_t k = 0; k < K; ++k) low_sum.add(coefficient[k].low), high_sum.add(coefficient[k].high);
    const Pair whole = {low_sum.total, high_sum.total};
    for (int64_t first = 0; first < C; first += kFeatures) {
        Pair scale[kFeatures] = {}, offset[kFeatures] = {};
        for (int64_t k = 0; k < K; ++k, table += 2 * kFeatures) {
            const Floats low = coefficient[k].low, high = coefficient[k].high;
            for (int c = 0; c < kFeatures; ++c) {
                scale[c].low += low * table[c];
                scale[c].high += high * table[c];
                offset[c].low += low * table[kFeatures + c];
                offset[c].high += high * table[kFeatures + c];
            }
        }
        for (int i = 0; i < kFeatures && first + i < C; ++i) {
            const int64_t c = first + i;
            const float weight = of.weight ? of.weight[c] : 1.0f, bias = of.bias ? of.bias[c] : 0.0f;
            x[c].low = (x[c].low - of.center[c]) * (scale[i].low + whole.low * of.shared[c]) + offset[i].low;
            x[c].high = (x[c].high - of.center[c]) * (scale[i].high + whole.high * of.shared[c]) + offset[i].high;
            x[c] = {x[c].low * weight + bias, x[c].high * weight + bias};
        }
    }
}

// With densities, posteriors are found: y is made of them, or where there is no y, log_tau, and of each component the
// largest, peak (K,). Without, they are log_tau's.
template <typename T>
void mixture_forward(
    T* y, float* log_tau, float* peak, const T* x, Components of, int64_t N, int64_t C, int64_t K, int64_t L,
    bool in_rows, int threads) {
    const bool found = of.squared;
    const Densities densities(of, found ? C : 0, found ? K : 0);
    const auto terms = y ? packed(of.scales, of.offsets, C, K, kFeatures) : std::vector<float>();
    const int64_t vectors = N * L, step = in_rows ? L : 1;
    if (!y) std::fill_n(peak, K, -INFINITY);
    const int64_t each = C + (found ? C : 0) + K + (y ? 0 : K);  // of scratch: nothing below allocates, and so may fail
    std::vector<Pair> scratch(each * threads);
#pragma omp parallel num_threads(threads)
    {
        Pair *block = &scratch[each * omp_get_thread_num()], *logs = block + C;
        Pair *bounded = found ? logs + K : nullptr, *largest = y ? nullptr : block + each - K;
        if (largest) std::fill_n(largest, K, Pair{all(-INFINITY), all(-INFINITY)});
        float(*values)[kLanes] = (float(*)[kLanes])block;
        float(*shares)[kLanes] = (float(*)[kLanes])logs;
#pragma omp for schedule(static)
        for (int64_t first = 0; first < vectors; first += kLanes) {
            const Lanes lanes(first, vectors, C, L, in_rows), weights(first, vectors, K, L, in_rows);
            lanes.each(C, step, [=](int64_t c, int lane, int64_t at) { values[c][lane] = load(x[at]) - of.shift[c]; });
            for (int lane = lanes.count; lane < kLanes; ++lane)  // the others are as the first
                for (int64_t c = 0; c < C; ++c) values[c][lane] = values[c][0];
            if (found) {
                for (int64_t c = 0; c < C; ++c)
                    bounded[c] = {within(block[c].low, *of.reach), within(block[c].high, *of.reach)};
                densities.log(logs, bounded, C, K);
                posteriors(logs, K, [](Pair& pair) -> Floats& { return pair.low; }, !y);
                posteriors(logs, K, [](Pair& pair) -> Floats& { return pair.high; }, !y);
            } else {
                weights.each(K, step, [=](int64_t k, int lane, int64_t at) { shares[k][lane] = log_tau[at]; });
                for (int64_t k = 0; k < K; ++k) logs[k] = {exponential(logs[k].low), exponential(logs[k].high)};
            }
            if (y) {
                for (int64_t k = 0; k < K; ++k) logs[k] = {logs[k].low * of.factor[k], logs[k].high * of.factor[k]};
                combine(block, logs, terms.data(), of, C, K);
                lanes.each(C, step, [=](int64_t c, int lane, int64_t at) { store(y + at, values[c][lane]); });
            } else {
                weights.each(K, step, [=](int64_t k, int lane, int64_t at) { log_tau[at] = shares[k][lane]; });
                for (int64_t k = 0; k < K; ++k)
                    largest[k] = {larger(logs[k].low, largest[k].low), larger(logs[k].high, largest[k].high)};
            }
        }
#pragma omp critical
        for (int64_t k = 0; k < (largest ? K : 0); ++k)
            for (int lane = 0; lane < kWidth; ++lane)
                peak[k] = std::max({peak[k], largest[k].low[lane], largest[k].high[lane]});
    }
}

inline float sum_of(Floats x) {
    for (int half = kWidth / 2; half; half /= 2)
        for (int lane = 0; lane < half; ++lane) x[lane] += x[lane + half];
    return x[0];
}

// To sums (2, K, C), those of a span's vectors and of their squares, weighted: rows of kRow, kSteps of them in use.
constexpr int64_t kSteps = kSpan / kWidth, kRow = kSteps + 1;  // rows a power of two apart would share cache lines
constexpr int kWeights = kFeatures;

void add_moments(double* sums, const Floats* block, const Floats* weight, int64_t C, int64_t K) {
    for (int64_t c = 0; c < C; c += kSums)
        for (int64_t k = 0; k < K; k += kWeights) {
            Floats moment[kWeights][kSums] = {}, square[kWeights][kSums] = {};
            for (int64_t i = 0; i < kSteps; ++i)
                for (int b = 0; b < kSums; ++b) {
                    const Floats value = block[(c + b) * kRow + i], squared = value * value;
                    for (int a = 0; a < kWeights; ++a) {
                        moment[a][b] += weight[(k + a) * kRow + i] * value;
                        square[a][b] += weight[(k + a) * kRow + i] * squared;
                    }
                }
            for (int a = 0; a < kWeights && k + a < K; ++a)
                for (int b = 0; b < kSums && c + b < C; ++b) {
                    sums[(k + a) * C + c + b] += sum_of(moment[a][b]);
                    sums[(K + k + a) * C + c + b] += sum_of(square[a][b]);
                }
        }
}

// Sums of weights exp(log_tau - peak) (segments, K), and of vectors less `point` and of their squares, times those
// (segments, K, C) each, over as many segments of the vectors.
template <typename T>
void mixture_sums(
    float* total, float* first, float* second, const float* log_tau, const float* peak, const T* x, const float* point,
    int64_t N, int64_t C, int64_t K, int64_t L, int64_t segments, bool in_rows, int threads) {
    const int64_t vectors = N * L, step = in_rows ? L : 1, spans = (vectors + kSpan - 1) / kSpan;
    threads = int(std::min<int64_t>(threads, segments));
    const int64_t rows = (C + kSums + K + kWeights) * kRow, counts = 2 * K * C + K;
    std::vector<Floats> scratch(rows * threads);  // nothing below allocates, and so may fail
    std::vector<double> totals(counts * threads);
#pragma omp parallel num_threads(threads)
    {
        Floats *block = &scratch[rows * omp_get_thread_num()], *weight = block + (C + kSums) * kRow;
        double *sums = &totals[counts * omp_get_thread_num()], *weights = sums + 2 * K * C;
        float(*values)[kRow * kWidth] = (float(*)[kRow * kWidth])block;
        float(*shares)[kRow * kWidth] = (float(*)[kRow * kWidth])weight;
#pragma omp for schedule(static)
        for (int64_t segment = 0; segment < segments; ++segment) {
            std::fill_n(sums, counts, 0);
            for (int64_t span = segment * spans / segments; span < (segment + 1) * spans / segments; ++span) {
                const int64_t start = span * kSpan, end = std::min(vectors, start + kSpan);
                if (end < start + kSpan)  // vectors that are not there weigh nothing
                    std::fill_n(weight, (K + kWeights) * kRow, all(-INFINITY));
                for (int64_t at = start; at < end; at += kLanes) {
                    const Lanes lanes(at, end, C, L, in_rows), logs(at, end, K, L, in_rows);
                    lanes.each(C, step, [=](int64_t c, int lane, int64_t i) {
                        values[c][at - start + lane] = load(x[i]) - point[c];
                    });
                    logs.each(K, step, [=](int64_t k, int lane, int64_t i) {
                        shares[k][at - start + lane] = log_tau[i] - peak[k];
                    });
                }
                for (int64_t k = 0; k < K; ++k) {
                    Floats sum{};
                    for (int64_t i = k * kRow; i < k * kRow + kSteps; ++i) sum += weight[i] = exponential(weight[i]);
                    weights[k] += sum_of(sum);
                }
                add_moments(sums, block, weight, C, K);
            }
            std::copy_n(weights, K, total + segment * K);
            std::copy_n(sums, K * C, first + segment * K * C);
            std::copy_n(sums + K * C, K * C, second + segment * K * C);
        }
    }
}

}  // namespace

// Each returns whether there was memory enough: an exception must not leave them.
#define KERNELS(name, T)                                                                                               \
    EXPORT int mixture_forward_##name(                                                                                 \
        T* y, float* log_tau, float* peak, const T* x, Components of, int64_t N, int64_t C, int64_t K, int64_t L,      \
        int in_rows, int threads) try {                                                                                \
        mixture_forward(y, log_tau, peak, x, of, N, C, K, L, in_rows, threads);                                        \
        return 1;                                                                                                      \
    } catch (const std::bad_alloc&) {                                                                                  \
        return 0;                                                                                                      \
    }                                                                                                                  \
    EXPORT int mixture_sums_##name(                                                                                    \
        float* total, float* first, float* second, const float* log_tau, const float* peak, const T* x,                \
        const float* point, int64_t N, int64_t C, int64_t K, int64_t L, int64_t segments, int in_rows, int threads)    \
        try {                                                                                                          \
        mixture_sums(total, first, second, log_tau, peak, x, point, N, C, K, L, segments, in_rows, threads);           \
        return 1;                                                                                                      \
    } catch (const std::bad_alloc&) {                                                                                  \
        return 0;                                                                                                      \
    }

KERNELS(float32, float)
KERNELS(bfloat16, bfloat16)
