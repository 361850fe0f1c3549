// All contexts of every vector, weighted by its posteriors (Eq. 9), on a CPU: x is read once.
//
// A block of kLanes vectors at a time is laid feature after feature, so that registers hold different vectors and that
// features and positions may lie in either order. Tables are packed as they are walked.
//
// Legend: N samples, C features, L positions of a sample, K components. `in_rows`: a feature's positions lie together
// in x and y, (N, C, L); else (N, L, C).

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

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));

struct Pair {  // of registers: one number of each vector of a block
    Floats low, high;
};

struct Components {
    const float *shift, *scale, *offset, *level, *reach;       // (C,), (C, K), (C, K), (K,), (): of their densities
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

// Densities -1/2 (scale x - offset)^2 + level: the expanded square would cancel.
struct Densities {
    std::vector<float> table;
    const float* level;

    Densities(const Components& of, int64_t C, int64_t K)
        : table(packed(of.scale, of.offset, K, C, kComponents)), level(of.level) {}

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

// Logarithms of densities become posteriors.
template <typename Half>
void posteriors(Pair* logs, int64_t K, Half half) {
    Floats peak = half(logs[0]);
    for (int64_t k = 1; k < K; ++k) peak = larger(half(logs[k]), peak);
    Sum sum;
    for (int64_t k = 0; k < K; ++k) sum.add(half(logs[k]) = exponential(half(logs[k]) - peak));
    for (int64_t k = 0; k < K; ++k) half(logs[k]) /= sum.total;
}

// Vectors become the sums of their components, in place.
void add_up(Pair* x, const Pair* coefficient, const float* table, const Components& of, int64_t C, int64_t K) {
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

template <typename T>
void combine(
    T* y, const T* x, Components of, int64_t N, int64_t C, int64_t K, int64_t L, bool in_rows, int threads) {
    const Densities densities(of, C, K);
    const auto terms = packed(of.scales, of.offsets, C, K, kFeatures);
    const int64_t vectors = N * L, step = in_rows ? L : 1, each = 2 * C + K;
    std::vector<Pair> scratch(each * threads);  // nothing below allocates, and so may fail
#pragma omp parallel num_threads(threads)
    {
        Pair *block = &scratch[each * omp_get_thread_num()], *bounded = block + C, *logs = bounded + C;
        float(*values)[kLanes] = (float(*)[kLanes])block;
#pragma omp for schedule(static)
        for (int64_t first = 0; first < vectors; first += kLanes) {
            const Lanes lanes(first, vectors, C, L, in_rows);
            lanes.each(C, step, [=](int64_t c, int lane, int64_t at) { values[c][lane] = load(x[at]) - of.shift[c]; });
            for (int lane = lanes.count; lane < kLanes; ++lane)  // the others are as the first
                for (int64_t c = 0; c < C; ++c) values[c][lane] = values[c][0];
            for (int64_t c = 0; c < C; ++c)
                bounded[c] = {within(block[c].low, *of.reach), within(block[c].high, *of.reach)};
            densities.log(logs, bounded, C, K);
            posteriors(logs, K, [](Pair& pair) -> Floats& { return pair.low; });
            posteriors(logs, K, [](Pair& pair) -> Floats& { return pair.high; });
            for (int64_t k = 0; k < K; ++k) logs[k] = {logs[k].low * of.factor[k], logs[k].high * of.factor[k]};
            add_up(block, logs, terms.data(), of, C, K);
            lanes.each(C, step, [=](int64_t c, int lane, int64_t at) { store(y + at, values[c][lane]); });
        }
    }
}

}  // namespace

// Returns whether there was memory enough: an exception must not leave it.
#define KERNEL(name, T)                                                                                                \
    EXPORT int combine_##name(                                                                                         \
        T* y, const T* x, Components of, int64_t N, int64_t C, int64_t K, int64_t L, int in_rows, int threads) try {   \
        combine(y, x, of, N, C, K, L, in_rows, threads);                                                               \
        return 1;                                                                                                      \
    } catch (const std::bad_alloc&) {                                                                                  \
        return 0;                                                                                                      \
    }

KERNEL(float32, float)
KERNEL(bfloat16, bfloat16)
