// The fused forms of Eq. 8 on a CPU: every number of x is read once and every result written once, in each direction.
//
// Legend: N samples, C features, L positions of a sample. `Rows` are maps whose positions lie together, (N, C, L);
// `Vectors` are tokens and channels-last maps, whose features do, (N, L, C). Coefficients are float, one row a sample,
// their rows `stride` apart (0: one row for all). Sums are taken in blocks, so that their error does not grow with L.

#include <cmath>
#include <vector>

#include "native_types.h"

namespace {

struct Coefficients {
    const float *center, *scale, *offset;  // offset may be null
    int64_t center_stride, scale_stride, offset_stride;
};

constexpr int64_t kRowBlock = 2048;  // positions summed in one go
constexpr int64_t kVectorBlock = 32;

template <typename T>
void rows_forward(T* y, const T* x, Coefficients k, int64_t N, int64_t C, int64_t L, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
    for (int64_t n = 0; n < N; ++n)
        for (int64_t c = 0; c < C; ++c) {
            const float center = k.center[n * k.center_stride + c], scale = k.scale[n * k.scale_stride + c];
            const float offset = k.offset ? k.offset[n * k.offset_stride + c] : 0.0f;
            const T* from = x + (n * C + c) * L;
            T* to = y + (n * C + c) * L;
#pragma omp simd
            for (int64_t l = 0; l < L; ++l) store(to + l, (load(from[l]) - center) * scale + offset);
        }
}

template <typename T>
void rows_backward(
    T* grad_x, float* sums, float* dots, const T* grad, const T* x, Coefficients k, int64_t N, int64_t C, int64_t L,
    int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
    for (int64_t n = 0; n < N; ++n)
        for (int64_t c = 0; c < C; ++c) {
            const float center = k.center[n * k.center_stride + c], scale = k.scale[n * k.scale_stride + c];
            const T *g = grad + (n * C + c) * L, *from = x + (n * C + c) * L;
            T* to = grad_x ? grad_x + (n * C + c) * L : nullptr;
            double sum = 0, dot = 0;
            for (int64_t start = 0; start < L; start += kRowBlock) {
                const int64_t end = start + kRowBlock < L ? start + kRowBlock : L;
                float block_sum = 0, block_dot = 0;
                if (to) {
#pragma omp simd reduction(+ : block_sum, block_dot)
                    for (int64_t l = start; l < end; ++l) {
                        const float value = load(g[l]);
                        store(to + l, value * scale);
                        block_sum += value;
                        block_dot += value * (load(from[l]) - center);
                    }
                } else {
#pragma omp simd reduction(+ : block_sum, block_dot)
                    for (int64_t l = start; l < end; ++l) {
                        const float value = load(g[l]);
                        block_sum += value;
                        block_dot += value * (load(from[l]) - center);
                    }
                }
                sum += block_sum;
                dot += block_dot;
            }
            sums[n * C + c] = float(sum);
            dots[n * C + c] = float(dot);
        }
}

// One vector's mean (0 unless centered) and 1 / sqrt(variance + eps). What rounding has left in the first mean of a vector
// far from zero is the mean of the deviations from it.
template <typename T>
inline void vector_statistics(const T* x, int64_t C, float eps, bool centered, float* mean, float* rstd) {
    float total = 0, rest = 0, squared = 0;
    if (centered) {
#pragma omp simd reduction(+ : total)
        for (int64_t c = 0; c < C; ++c) total += load(x[c]);
    }
    const float middle = centered ? total / C : 0.0f;
#pragma omp simd reduction(+ : rest, squared)
    for (int64_t c = 0; c < C; ++c) {
        const float deviation = load(x[c]) - middle;
        rest += deviation;
        squared += deviation * deviation;
    }
    rest = centered ? rest / C : 0.0f;
    const float variance = squared / C - rest * rest;  // of nearly equal numbers rounding may leave less than nothing
    *mean = middle + rest;
    *rstd = 1.0f / std::sqrt((variance < 0 ? 0 : variance) + eps);
}

// With `standardize`, each vector is standardised over its features first, and its statistics go to mean and rstd.
template <typename T, bool standardize>
void vectors_forward(
    T* y, float* mean, float* rstd, const T* x, Coefficients k, int64_t N, int64_t L, int64_t C, float eps,
    bool centered, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
    for (int64_t n = 0; n < N; ++n)
        for (int64_t l = 0; l < L; ++l) {
            const int64_t row = n * L + l;
            const float *center = k.center + n * k.center_stride, *scale = k.scale + n * k.scale_stride;
            const float* offset = k.offset ? k.offset + n * k.offset_stride : nullptr;
            const T* from = x + row * C;
            T* to = y + row * C;
            float middle = 0, unit = 1;
            if (standardize) {
                vector_statistics(from, C, eps, centered, &middle, &unit);
                mean[row] = middle;
                rstd[row] = unit;
            }
            if (offset) {
#pragma omp simd
                for (int64_t c = 0; c < C; ++c)
                    store(to + c, ((load(from[c]) - middle) * unit - center[c]) * scale[c] + offset[c]);
            } else {
#pragma omp simd
                for (int64_t c = 0; c < C; ++c)
                    store(to + c, ((load(from[c]) - middle) * unit - center[c]) * scale[c]);
            }
        }
}

// Positions of a sample are split into `segments`, so that a few large samples occupy all threads: sums and dots are
// (N, segments, C).
template <typename T, bool standardize>
void vectors_backward(
    T* grad_x, float* sums, float* dots, const T* grad, const T* x, const float* mean, const float* rstd,
    Coefficients k, int64_t N, int64_t L, int64_t C, int64_t segments, bool centered, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> block(2 * C);
        float *block_sum = block.data(), *block_dot = block_sum + C;
#pragma omp for schedule(static) collapse(2)
        for (int64_t n = 0; n < N; ++n)
            for (int64_t segment = 0; segment < segments; ++segment) {
                const float *center = k.center + n * k.center_stride, *scale = k.scale + n * k.scale_stride;
                float *sum = sums + (n * segments + segment) * C, *dot = dots + (n * segments + segment) * C;
                for (int64_t c = 0; c < C; ++c) sum[c] = dot[c] = block_sum[c] = block_dot[c] = 0;
                const int64_t begin = segment * L / segments, end = (segment + 1) * L / segments;
                for (int64_t l = begin; l < end; ++l) {
                    const T *g = grad + (n * L + l) * C, *from = x + (n * L + l) * C;
                    T* to = grad_x ? grad_x + (n * L + l) * C : nullptr;
                    const float middle = standardize ? mean[n * L + l] : 0, unit = standardize ? rstd[n * L + l] : 1;
                    float shared = 0, along = 0;
                    if (standardize && to) {
#pragma omp simd reduction(+ : shared, along)
                        for (int64_t c = 0; c < C; ++c) {
                            const float weighted = load(g[c]) * scale[c];
                            shared += weighted;
                            along += weighted * ((load(from[c]) - middle) * unit);
                        }
                        shared = centered ? shared / C : 0;
                        along /= C;
                    }
                    if (to) {
#pragma omp simd
                        for (int64_t c = 0; c < C; ++c) {
                            const float value = load(g[c]), normalized = (load(from[c]) - middle) * unit;
                            const float through =
                                standardize ? (value * scale[c] - shared - normalized * along) * unit : value * scale[c];
                            store(to + c, through);
                            block_sum[c] += value;
                            block_dot[c] += value * (normalized - center[c]);
                        }
                    } else {
#pragma omp simd
                        for (int64_t c = 0; c < C; ++c) {
                            const float value = load(g[c]), normalized = (load(from[c]) - middle) * unit;
                            block_sum[c] += value;
                            block_dot[c] += value * (normalized - center[c]);
                        }
                    }
                    if ((l - begin) % kVectorBlock == kVectorBlock - 1 || l == end - 1) {
                        for (int64_t c = 0; c < C; ++c) {
                            sum[c] += block_sum[c];
                            dot[c] += block_dot[c];
                            block_sum[c] = block_dot[c] = 0;
                        }
                    }
                }
            }
    }
}

}  // namespace

#define KERNELS(name, T)                                                                                               \
    EXPORT void rows_forward_##name(                                                                                   \
        T* y, const T* x, Coefficients k, int64_t N, int64_t C, int64_t L, int threads) {                              \
        rows_forward(y, x, k, N, C, L, threads);                                                                       \
    }                                                                                                                  \
    EXPORT void rows_backward_##name(                                                                                  \
        T* grad_x, float* sums, float* dots, const T* grad, const T* x, Coefficients k, int64_t N, int64_t C,          \
        int64_t L, int threads) {                                                                                      \
        rows_backward(grad_x, sums, dots, grad, x, k, N, C, L, threads);                                               \
    }                                                                                                                  \
    EXPORT void vectors_forward_##name(                                                                                \
        T* y, float* mean, float* rstd, const T* x, Coefficients k, int64_t N, int64_t L, int64_t C, float eps,        \
        int centered, int threads) {                                                                                   \
        if (rstd)                                                                                                      \
            vectors_forward<T, true>(y, mean, rstd, x, k, N, L, C, eps, centered, threads);                            \
        else                                                                                                           \
            vectors_forward<T, false>(y, mean, rstd, x, k, N, L, C, eps, centered, threads);                           \
    }                                                                                                                  \
    EXPORT void vectors_backward_##name(                                                                               \
        T* grad_x, float* sums, float* dots, const T* grad, const T* x, const float* mean, const float* rstd,          \
        Coefficients k, int64_t N, int64_t L, int64_t C, int64_t segments, int centered, int threads) {                \
        if (rstd)                                                                                                      \
            vectors_backward<T, true>(grad_x, sums, dots, grad, x, mean, rstd, k, N, L, C, segments, centered, threads); \
        else                                                                                                           \
            vectors_backward<T, false>(                                                                                \
                grad_x, sums, dots, grad, x, mean, rstd, k, N, L, C, segments, centered, threads);                     \
    }

KERNELS(float32, float)
KERNELS(bfloat16, bfloat16)
