// The numbers the CPU's kernels read and write; what they compute with is float.

#pragma once

#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct bfloat16 {
    uint16_t bits;
};

inline float load(float value) { return value; }
inline float load(bfloat16 value) { return __builtin_bit_cast(float, uint32_t(value.bits) << 16); }

inline void store(float* at, float value) { *at = value; }
inline void store(bfloat16* at, float value) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    at->bits = uint16_t(value == value ? rounded : (bits >> 16) | 0x40);  // a NaN stays one
}

}  // namespace
