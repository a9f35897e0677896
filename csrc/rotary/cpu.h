// Rotary position embedding on the CPU: what binding_cpu.cpp calls.
#pragma once

#include "common/format.h"

namespace ml {

// x[batch, tokens, heads, 2 half] with any strides but a dense last dimension; out is dense; cos and sin are dense
// [batch or 1, tokens, half], and `angle_batch_stride` is 0 where they have one row for all of the batch.
struct RotaryShape {
  int64_t tokens, heads, half;
  int64_t batch_stride, token_stride, head_stride, angle_batch_stride;
};

struct RotaryCpu {
  // Tokens begin..end, counted over batch and tokens: (a, b) -> (a cos - sign b sin, b cos + sign a sin), where a and b
  // are the two halves of a head. sign = -1 is the inverse rotation, which is the backward.
  void (*rotate)(Format format, const RotaryShape& shape, const void* x, const float* cos, const float* sin, float sign,
                 void* out, int64_t begin, int64_t end);
};

extern const RotaryCpu rotary_portable, rotary_avx2, rotary_avx512;

}  // namespace ml
