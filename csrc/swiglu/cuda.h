// Gated activations on CUDA: what binding_cuda.cpp calls. Plain C types, so that cuda.cu needs no header of torch.
#pragma once

#include "common/activation.h"
#include "common/format.h"

namespace ml {

// out[rows, half] from gate_up[rows, 2 half]. All pointers are on the current device. Returns a CUDA error code; 0 is
// success.
int swiglu_forward_cuda(Format format, Activation activation, const void* gate_up, void* out, int64_t rows,
                        int64_t half, void* stream);

// d_gate_up[rows, 2 half] from d_out[rows, half] and gate_up[rows, 2 half].
int swiglu_backward_cuda(Format format, Activation activation, const void* d_out, const void* gate_up, void* d_gate_up,
                         int64_t rows, int64_t half, void* stream);

}  // namespace ml
