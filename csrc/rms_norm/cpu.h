// RMSNorm on the CPU: what binding_cpu.cpp calls. One table of functions for each instruction set of this build.
#pragma once

#include "common/format.h"

namespace ml {

struct RmsNormCpu {
  // Rows begin..end of y[rows, dim] and rstd[rows] from x[rows, dim] and weight[dim].
  void (*forward)(Format format, const void* x, const float* weight, void* y, float* rstd, int64_t begin, int64_t end,
                  int64_t dim, float eps);
  // Rows begin..end of the gradient dx[rows, dim]; their part of the weight's gradient goes to weight_part[dim].
  void (*backward)(Format format, const void* dy, const void* x, const float* weight, const float* rstd, void* dx,
                   float* weight_part, int64_t begin, int64_t end, int64_t dim);
  // Columns begin..end of dweight[dim] = sum over blocks, in order and in fp64, of weight_parts[num_blocks, dim].
  void (*sum_parts)(const float* weight_parts, float* dweight, int64_t num_blocks, int64_t begin, int64_t end,
                    int64_t dim);
};

extern const RmsNormCpu rms_norm_portable, rms_norm_avx2, rms_norm_avx512;

}  // namespace ml
