// What the CUDA kernels of RMSNorm and LayerNorm are given. Plain C types: the .cu files need no header of torch.
#pragma once

#include "common/format.h"

namespace ml {

// Rows whose weight gradient one thread block sums: part of the result's definition, so it depends on nothing.
constexpr int64_t kCudaRowsPerBlock = 32;

// As NormForward of norm.h. Weight and bias are of one format, which is x's or fp32.
struct NormForwardCuda {
  const void *x, *residual, *weight, *bias;
  void *sum, *y;
  float *mean, *rstd;
  int64_t rows, dim;
  float eps;
};

// As NormBackward of norm.h. The two parts, [ceil(rows / kCudaRowsPerBlock), dim] each, are scratch space. For RMSNorm
// mean, bias_parts and dbias are null.
struct NormBackwardCuda {
  const void *dy, *dsum, *input, *weight;
  const float *mean, *rstd;
  void* dx;
  float *weight_parts, *bias_parts;
  void *dweight, *dbias;
  int64_t rows, dim;
};

}  // namespace ml
