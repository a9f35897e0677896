// LayerNorm on CUDA, forward and backward: see common/norm.cuh and norm_launch.cuh.

#include "layer_norm/cuda.h"

#include "common/norm_launch.cuh"

namespace ml {

int layer_norm_forward_cuda(Format format, Format weight_format, const NormForwardCuda& in, void* stream) {
  return norm_forward<true>(format, weight_format, in, stream);
}

int layer_norm_backward_cuda(Format format, Format weight_format, const NormBackwardCuda& in, void* stream) {
  return norm_backward<true>(format, weight_format, in, stream);
}

}  // namespace ml
