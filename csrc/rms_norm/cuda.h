// RMSNorm on CUDA: what binding_cuda.cpp calls.
#pragma once

#include "common/norm_cuda.h"

namespace ml {

// All pointers are on the current device. They return a CUDA error code; 0 is success.
int rms_norm_forward_cuda(Format format, Format weight_format, const NormForwardCuda& in, void* stream);
int rms_norm_backward_cuda(Format format, Format weight_format, const NormBackwardCuda& in, void* stream);

const char* cuda_error_string(int code);

}  // namespace ml
