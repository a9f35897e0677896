// LayerNorm on CUDA: what binding_cuda.cpp calls.
#pragma once

#include "common/norm_cuda.h"

namespace ml {

// All pointers are on the current device. They return a CUDA error code; 0 is success.
int layer_norm_forward_cuda(Format format, Format weight_format, const NormForwardCuda& in, void* stream);
int layer_norm_backward_cuda(Format format, Format weight_format, const NormBackwardCuda& in, void* stream);

}  // namespace ml
