// Adding a gradient to its fp32 sum on the CPU: what binding_cpu.cpp calls.
#pragma once

#include "common/format.h"

namespace ml {

struct AccumulateCpu {
  // total[i] += values[i] for i in begin..end; values as `format` stores them.
  void (*add)(Format format, float* total, const void* values, int64_t begin, int64_t end);
};

extern const AccumulateCpu accumulate_portable, accumulate_avx2, accumulate_avx512;

}  // namespace ml
