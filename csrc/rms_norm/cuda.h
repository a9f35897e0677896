// RMSNorm on CUDA: what binding_cuda.cpp calls. Plain C types, so that cuda.cu needs no header of torch.
#pragma once

#include "common/format.h"

namespace ml {

// Rows whose weight gradient one thread block sums: part of the result's definition, so it depends on nothing.
constexpr int64_t kCudaRowsPerBlock = 32;

// y[rows, dim] and rstd[rows] from x[rows, dim] and weight[dim] of format `weight_format`. All pointers are on the
// current device. Returns a CUDA error code; 0 is success.
int rms_norm_forward_cuda(Format format, Format weight_format, const void* x, const void* weight, void* y, float* rstd,
                          int64_t rows, int64_t dim, float eps, void* stream);

// dx[rows, dim] and dweight[dim]; weight_parts[ceil(rows / kCudaRowsPerBlock), dim] is scratch space.
int rms_norm_backward_cuda(Format format, Format weight_format, const void* dy, const void* x, const void* weight,
                           const float* rstd, void* dx, void* dweight, float* weight_parts, int64_t rows, int64_t dim,
                           void* stream);

const char* cuda_error_string(int code);

}  // namespace ml
