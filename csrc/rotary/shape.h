// What the rotary kernels of CPU and CUDA are told.
//
// A head's pair (a, b) becomes (a cos - sign b sin, b cos + sign a sin). Pairs are (i, i + half), or (2i, 2i + 1) where
// they are interleaved; what lies behind the 2 half numbers that are rotated stays. sign = -1 is the inverse rotation,
// which is the backward.
#pragma once

#include <stdint.h>

namespace ml {

struct RotaryShape {
  int64_t batch, tokens;
  int64_t dim, half;  // numbers of a head, and pairs that are rotated
  // cos and sin are dense [batch or 1, tokens, half]; 0 where they have one row for all of the batch.
  int64_t angle_batch_stride;
  bool is_interleaved;
  float sign;
};

// Strides of batch, token and head, in numbers; within a head the numbers are dense.
struct RotaryStrides {
  int64_t batch, token, head;
};

// q or k: `out` may be `in`, with the same strides.
struct RotaryHeads {
  const void* in;
  void* out;
  int64_t count;
  RotaryStrides in_strides, out_strides;
};

}  // namespace ml
