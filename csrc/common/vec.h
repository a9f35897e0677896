// Sixteen fp32 lanes in the compiler's own vector type: one register under AVX-512, two under AVX2, four under SSE or
// NEON. Every instruction set adds in the same order; they differ only in where they fuse a multiplication and an
// addition into one rounding.
//
// A file that includes this is compiled once for each instruction set, with ML_ISA naming it. Everything lives in an
// anonymous namespace and no standard header with inline functions is included: else the linker could keep the AVX-512
// copy of a shared inline function and run it on a CPU without AVX-512.
#pragma once

#include <stdint.h>

#ifdef __AVX512BF16__
#include <immintrin.h>  // intrinsics are inlined always: no copy of them reaches the linker
#endif

namespace {

constexpr int64_t kLanes = 16;

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

// rms_norm -> rms_norm_avx2 and so on: the name of this compilation's table of functions.
#define ML_JOIN_(a, b) a##_##b
#define ML_JOIN(a, b) ML_JOIN_(a, b)
#define ML_FOR_ISA(op) ML_JOIN(op, ML_ISA)

#define ML_INLINE inline __attribute__((always_inline))

ML_INLINE f32x16 splat(float value) { return f32x16{} + value; }

// Sixteen lanes of two vectors, by their numbers: those of `a` are 0 to 15, those of `b` 16 to 31.
#ifdef __clang__
#define ML_SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define ML_SHUFFLED(a, b, ...) __builtin_shuffle(a, b, i32x16{__VA_ARGS__})
#endif

// Storage formats: how `count` <= 16 stored numbers become fp32 lanes and back. Lanes past `count` read as zero.

struct Fp32 {
  using Stored = float;
  static ML_INLINE f32x16 load(const Stored* source, int64_t count = kLanes) {
    f32x16 lanes{};
    __builtin_memcpy(&lanes, source, count * sizeof(Stored));
    return lanes;
  }
  static ML_INLINE void store(Stored* target, f32x16 lanes, int64_t count = kLanes) {
    __builtin_memcpy(target, &lanes, count * sizeof(Stored));
  }
};

struct Bf16 {
  using Stored = uint16_t;
  static ML_INLINE f32x16 load(const Stored* source, int64_t count = kLanes) {
    u16x16 packed{};
    __builtin_memcpy(&packed, source, count * sizeof(Stored));
    return (f32x16)(__builtin_convertvector(packed, u32x16) << 16);
  }
  static ML_INLINE void store(Stored* target, f32x16 lanes, int64_t count = kLanes) {
#ifdef __AVX512BF16__  // one instruction; it differs from what follows in making zeros of numbers below 2^-126
    const __m256bh packed = _mm512_cvtneps_pbh((__m512)lanes);
#else
    const u32x16 bits = (u32x16)lanes;
    const u32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    const u32x16 is_nan = (u32x16)(lanes != lanes);  // by masks: GCC takes `?:` on wide vectors apart, lane by lane
    const u16x16 packed = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0u), u16x16);
#endif
    __builtin_memcpy(target, &packed, count * sizeof(Stored));
  }
};

struct Fp16 {
  using Stored = uint16_t;
  static ML_INLINE f32x16 load(const Stored* source, int64_t count = kLanes) {
    u16x16 packed{};
    __builtin_memcpy(&packed, source, count * sizeof(Stored));
    const u32x16 half = __builtin_convertvector(packed, u32x16);
    const u32x16 magnitude = (half & 0x7fffu) << 13;
    // 2^112 moves the exponent from fp16's bias to fp32's, and normalises fp16's subnormal numbers on the way.
    const u32x16 finite = (u32x16)((f32x16)magnitude * 0x1p112f);
    const u32x16 is_special = (u32x16)((half & 0x7fffu) >= 0x7c00u);  // infinity or NaN
    const u32x16 bits = (finite & ~is_special) | (is_special & (magnitude | 0x7f800000u));
    return (f32x16)(bits | ((half & 0x8000u) << 16));
  }
  static ML_INLINE void store(Stored* target, f32x16 lanes, int64_t count = kLanes) {
    const u32x16 bits = (u32x16)lanes;
    const u32x16 magnitude = bits & 0x7fffffffu;
    const u32x16 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding one half lines the mantissa up with fp16's subnormal spacing, 2^-24; the addition does the rounding.
    const u32x16 subnormal = (u32x16)((f32x16)magnitude + 0.5f) - 0x3f000000u;
    const u32x16 is_small = (u32x16)(magnitude < 0x38800000u);  // below 2^-14
    const u32x16 is_large = (u32x16)(magnitude >= 0x47800000u);  // 2^16 and above, infinity, NaN
    const u32x16 is_nan = (u32x16)(magnitude > 0x7f800000u);
    const u32x16 large = 0x7c00u | (is_nan & 0x0200u);
    u32x16 half = (normal & ~is_small) | (subnormal & is_small);
    half = (half & ~is_large) | (large & is_large);
    const u16x16 packed = __builtin_convertvector(half | ((bits >> 16) & 0x8000u), u16x16);
    __builtin_memcpy(target, &packed, count * sizeof(Stored));
  }
};

// Adds the lanes pairwise: (0+8, 1+9, ...), then in fours, twos and ones.
ML_INLINE float sum_lanes(f32x16 lanes) {
  float part[kLanes];
  __builtin_memcpy(part, &lanes, sizeof(part));
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  return part[0];
}

// The vector that one register holds. GCC takes comparisons of wider ones apart, lane by lane.
#if defined(__AVX512F__)
typedef f32x16 Register;
#elif defined(__AVX2__)
typedef float Register __attribute__((vector_size(32)));
#else
typedef float Register __attribute__((vector_size(16)));
#endif

// Lane by lane the larger (smaller) of the two; `b` where either is NaN.
template <bool kSmaller = false>
ML_INLINE f32x16 larger(f32x16 a, f32x16 b) {
  constexpr int kRegisters = sizeof(f32x16) / sizeof(Register);
  Register a_parts[kRegisters], b_parts[kRegisters];
  __builtin_memcpy(a_parts, &a, sizeof(a));
  __builtin_memcpy(b_parts, &b, sizeof(b));
  for (int i = 0; i < kRegisters; ++i)
    b_parts[i] = (kSmaller ? a_parts[i] < b_parts[i] : a_parts[i] > b_parts[i]) ? a_parts[i] : b_parts[i];
  __builtin_memcpy(&b, b_parts, sizeof(b));
  return b;
}
ML_INLINE f32x16 smaller(f32x16 a, f32x16 b) { return larger<true>(a, b); }

// e^x to about one unit in the last place. Above 88.4 it is infinity, below -87 it stays at e^-87: the results between
// are normal numbers. NaN stays NaN.
// Cody and Waite's reduction x = n ln 2 + r, then a polynomial in r (the coefficients of the Cephes library's expf).
ML_INLINE f32x16 exp(f32x16 x) {
  x = smaller(splat(89.0f), larger(splat(-87.0f), x));  // at 89, n is 128: the exponent of infinity
  const f32x16 shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which lands in the low bits
  const f32x16 shifted = x * splat(1.44269504f) + shift;
  const f32x16 n = shifted - shift;
  const f32x16 r = (x - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
  f32x16 p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = (p * r) * r + r + splat(1.0f);
  const u32x16 exponent = ((u32x16)shifted - (u32x16)shift + 127u) << 23;
  return p * (f32x16)exponent;
}

}  // namespace
