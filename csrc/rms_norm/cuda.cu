// RMSNorm on CUDA, forward and backward: see common/norm.cuh and norm_launch.cuh.

#include "rms_norm/cuda.h"

#include "common/norm_launch.cuh"

namespace ml {

int rms_norm_forward_cuda(Format format, Format weight_format, const NormForwardCuda& in, void* stream) {
  return norm_forward<false>(format, weight_format, in, stream);
}

int rms_norm_backward_cuda(Format format, Format weight_format, const NormBackwardCuda& in, void* stream) {
  return norm_backward<false>(format, weight_format, in, stream);
}

const char* cuda_error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace ml
