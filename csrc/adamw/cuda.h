// AdamW on CUDA: what binding_cuda.cpp calls. Plain C types, so that cuda.cu needs no header of torch.
#pragma once

#include "adamw/update.h"

namespace ml {

// Updates elements begin..end on the current device. Returns a CUDA error code; 0 is success.
int adamw_cuda(const AdamWMemory& memory, const AdamWCoefficients& coefficients, float decay, int64_t begin,
               int64_t end, void* stream);

}  // namespace ml
