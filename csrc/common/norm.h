// What the CPU kernels of RMSNorm and LayerNorm are given. Arithmetic is fp32, whatever the storage format.
#pragma once

#include "common/format.h"

namespace ml {

// Numbers that the kernels take at a time. The arrays of fp32 that all rows share (weight, bias, and the parts of their
// gradients) are padded to a multiple of it, and lie in the order in which the format's numbers reach the registers.
constexpr int64_t kNormChunk = 32;

// static: each instruction set has its own copy (see vec.h).
static constexpr int64_t norm_padded(int64_t dim) { return (dim + kNormChunk - 1) / kNormChunk * kNormChunk; }

// `input[rows, dim]` is normalised to `y`. With an addition input = x + residual, in the storage format, and is written
// to `sum`; without one it is x, and residual and sum are null. RMSNorm has no bias and no mean: they are null.
struct NormForward {
  const void *x, *residual;
  const float *weight, *bias;  // arranged
  void *sum, *y;
  float *mean, *rstd;  // [rows]
  int64_t dim;
  float eps;
  bool streams;  // whether sum and y are written past the caches
};

// The gradient dx of the input, and the part of some rows in the gradients of weight and bias. `dsum` is null without
// an addition; with one it is the gradient that reaches the sum on the other way, and is added to dx.
struct NormBackward {
  const void *dy, *dsum, *input;
  const float *weight, *mean, *rstd;  // weight: arranged
  void* dx;
  int64_t dim;
  bool streams;  // whether dx is written past the caches
};

// One table for each instruction set.
struct NormCpu {
  // arranged[norm_padded(dim)] from plain[dim].
  void (*arrange)(Format format, const float* plain, float* arranged, int64_t dim);
  // Rows begin..end of sum, y, mean and rstd.
  void (*forward)(Format format, const NormForward& args, int64_t begin, int64_t end);
  // Rows begin..end of dx; their parts of the gradients of weight and bias (null for RMSNorm) go to the two arranged
  // arrays.
  void (*backward)(Format format, const NormBackward& args, float* weight_part, float* bias_part, int64_t begin,
                   int64_t end);
  // total[dim] = the sum over blocks, in order and in fp64, of parts[num_blocks, norm_padded(dim)], which are arranged.
  // Of its chunks, begin..end.
  void (*sum_parts)(Format format, const float* parts, float* total, int64_t num_blocks, int64_t dim, int64_t begin,
                    int64_t end);
};

}  // namespace ml
