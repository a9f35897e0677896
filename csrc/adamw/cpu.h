// AdamW on the CPU: what binding_cpu.cpp calls.
#pragma once

#include "adamw/update.h"
#include "common/format.h"

namespace ml {

struct AdamWCpu {
  // Updates elements begin..end of weights, first and second from the gradients, which are stored as
  // `gradient_format`, and writes the new weights, rounded to `parameter_format`, to parameters where that is not null.
  void (*update)(const AdamWMemory& memory, const AdamWCoefficients& coefficients, float decay, int64_t begin,
                 int64_t end);
};

extern const AdamWCpu adamw_portable, adamw_avx2, adamw_avx512;

}  // namespace ml
