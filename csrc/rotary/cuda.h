// Rotary embedding on CUDA: what binding_cuda.cpp calls. Plain C types, so that cuda.cu needs no header of torch.
#pragma once

#include "common/format.h"
#include "rotary/shape.h"

namespace ml {

// Rotates q and k. All pointers are on the current device. Returns a CUDA error code; 0 is success.
int rotary_cuda(Format format, const RotaryShape& shape, const RotaryHeads& q, const RotaryHeads& k, const float* cos,
                const float* sin, void* stream);

}  // namespace ml
