// Rotary position embedding on the CPU; rotary/shape.h says what it computes. Arithmetic is fp32, rounded once.

#include "rotary/cpu.h"

#include "common/vec.h"

namespace {

template <class T>
ML_INLINE void rotate_halves(const typename T::Stored* in, typename T::Stored* out, const float* cos, const float* sin,
                             float sign, int64_t half, int64_t count) {
  const f32x16 a = T::load(in, count), b = T::load(in + half, count);
  const f32x16 c = Fp32::load(cos, count), s = Fp32::load(sin, count) * splat(sign);
  T::store(out, a * c - b * s, count);
  T::store(out + half, b * c + a * s, count);
}

// `count` pairs of neighbours: they fill `count` lanes of two vectors together, 2 count numbers.
template <class T>
ML_INLINE void rotate_neighbours(const typename T::Stored* in, typename T::Stored* out, const float* cos,
                                 const float* sin, float sign, int64_t count) {
  constexpr int64_t kPairs = kLanes / 2;
  const int64_t low = count < kPairs ? count : kPairs, high = count - low;
  const f32x16 first = T::load(in, 2 * low), second = T::load(in + 2 * low, 2 * high);
  const f32x16 c = Fp32::load(cos, count), s = Fp32::load(sin, count) * splat(sign);
  const f32x16 a = ML_SHUFFLED(first, second, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const f32x16 b = ML_SHUFFLED(first, second, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  const f32x16 a_out = a * c - b * s, b_out = b * c + a * s;
  const f32x16 lower = ML_SHUFFLED(a_out, b_out, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const f32x16 upper = ML_SHUFFLED(a_out, b_out, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  T::store(out, lower, 2 * low);
  T::store(out + 2 * low, upper, 2 * high);
}

template <class T, bool kIsInterleaved>
void rotate_heads(const ml::RotaryShape& shape, const ml::RotaryHeads& heads, const float* cos, const float* sin,
                  int64_t b, int64_t t) {
  using Stored = typename T::Stored;
  const Stored* in = static_cast<const Stored*>(heads.in) + b * heads.in_strides.batch + t * heads.in_strides.token;
  Stored* out = static_cast<Stored*>(heads.out) + b * heads.out_strides.batch + t * heads.out_strides.token;
  const int64_t half = shape.half;
  for (int64_t h = 0; h < heads.count; ++h, in += heads.in_strides.head, out += heads.out_strides.head) {
    const auto lanes = [&](int64_t i, int64_t count) __attribute__((always_inline)) {
      if constexpr (kIsInterleaved)
        rotate_neighbours<T>(in + 2 * i, out + 2 * i, cos + i, sin + i, shape.sign, count);
      else
        rotate_halves<T>(in + i, out + i, cos + i, sin + i, shape.sign, half, count);
    };
    int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes) lanes(i, kLanes);
    if (i < half) lanes(i, half - i);
    if (in != out) __builtin_memcpy(out + 2 * half, in + 2 * half, (shape.dim - 2 * half) * sizeof(Stored));
  }
}

template <class T, bool kIsInterleaved>
void rotate_tokens(const ml::RotaryShape& shape, const ml::RotaryHeads& q, const ml::RotaryHeads& k,
                   const float* cos_all, const float* sin_all, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / shape.tokens, t = token % shape.tokens;
    const int64_t angles = b * shape.angle_batch_stride + t * shape.half;
    rotate_heads<T, kIsInterleaved>(shape, q, cos_all + angles, sin_all + angles, b, t);
    rotate_heads<T, kIsInterleaved>(shape, k, cos_all + angles, sin_all + angles, b, t);
  }
}

template <class T>
void rotate_stored(const ml::RotaryShape& shape, const ml::RotaryHeads& q, const ml::RotaryHeads& k, const float* cos,
                   const float* sin, int64_t begin, int64_t end) {
  if (shape.is_interleaved) return rotate_tokens<T, true>(shape, q, k, cos, sin, begin, end);
  rotate_tokens<T, false>(shape, q, k, cos, sin, begin, end);
}

void rotate(ml::Format format, const ml::RotaryShape& shape, const ml::RotaryHeads& q, const ml::RotaryHeads& k,
            const float* cos, const float* sin, int64_t begin, int64_t end) {
  switch (format) {
    case ml::Format::kFp32: return rotate_stored<Fp32>(shape, q, k, cos, sin, begin, end);
    case ml::Format::kBf16: return rotate_stored<Bf16>(shape, q, k, cos, sin, begin, end);
    case ml::Format::kFp16: return rotate_stored<Fp16>(shape, q, k, cos, sin, begin, end);
  }
}

}  // namespace

namespace ml {
extern const RotaryCpu ML_FOR_ISA(rotary) = {rotate};
}
