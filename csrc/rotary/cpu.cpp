// Rotary position embedding on the CPU; rotary/cpu.h says what it computes. Arithmetic is fp32, rounded once.

#include "rotary/cpu.h"

#include "common/vec.h"

namespace {

template <class T>
ML_INLINE void rotate_lanes(const typename T::Stored* x, const float* cos, const float* sin, float sign,
                            typename T::Stored* out, int64_t half, int64_t count) {
  const f32x16 a = T::load(x, count), b = T::load(x + half, count);
  const f32x16 c = Fp32::load(cos, count), s = Fp32::load(sin, count) * splat(sign);
  T::store(out, a * c - b * s, count);
  T::store(out + half, b * c + a * s, count);
}

template <class T>
void rotate_tokens(const ml::RotaryShape& shape, const void* x_all, const float* cos_all, const float* sin_all,
                   float sign, void* out_all, int64_t begin, int64_t end) {
  using Stored = typename T::Stored;
  const int64_t half = shape.half;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / shape.tokens, t = token % shape.tokens;
    const float* cos = cos_all + b * shape.angle_batch_stride + t * half;
    const float* sin = sin_all + b * shape.angle_batch_stride + t * half;
    for (int64_t h = 0; h < shape.heads; ++h) {
      const Stored* x = static_cast<const Stored*>(x_all) + b * shape.batch_stride + t * shape.token_stride +
                        h * shape.head_stride;
      Stored* out = static_cast<Stored*>(out_all) + (token * shape.heads + h) * 2 * half;
      int64_t i = 0;
      for (; i + kLanes <= half; i += kLanes)
        rotate_lanes<T>(x + i, cos + i, sin + i, sign, out + i, half, kLanes);
      if (i < half) rotate_lanes<T>(x + i, cos + i, sin + i, sign, out + i, half, half - i);
    }
  }
}

void rotate(ml::Format format, const ml::RotaryShape& shape, const void* x, const float* cos, const float* sin,
            float sign, void* out, int64_t begin, int64_t end) {
  switch (format) {
    case ml::Format::kFp32: return rotate_tokens<Fp32>(shape, x, cos, sin, sign, out, begin, end);
    case ml::Format::kBf16: return rotate_tokens<Bf16>(shape, x, cos, sin, sign, out, begin, end);
    case ml::Format::kFp16: return rotate_tokens<Fp16>(shape, x, cos, sin, sign, out, begin, end);
  }
}

}  // namespace

namespace ml {
extern const RotaryCpu ML_FOR_ISA(rotary) = {rotate};
}
