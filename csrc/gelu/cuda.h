// GELU on CUDA: what binding_cuda.cpp calls. Plain C types, so that cuda.cu needs no header of torch.
#pragma once

#include "common/activation.h"
#include "common/format.h"

namespace ml {

// out[count] from x[count], for the activations kGelu and kGeluErf. All pointers are on the current device. Returns a
// CUDA error code; 0 is success.
int gelu_forward_cuda(Format format, Activation activation, const void* x, void* out, int64_t count, void* stream);

// d_x[count] from d_out[count] and x[count].
int gelu_backward_cuda(Format format, Activation activation, const void* d_out, const void* x, void* d_x,
                       int64_t count, void* stream);

}  // namespace ml
