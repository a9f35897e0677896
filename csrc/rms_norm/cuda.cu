// RMSNorm on CUDA, forward and backward: see common/norm.cuh.

#include "rms_norm/cuda.h"

#include "common/norm.cuh"

namespace ml {
namespace {

// ceiling: 96 registers, 128 bytes of shared memory
template <class T, class W, int kPacks, bool kAdds>
__global__ void __launch_bounds__(kMaxThreads) forward_packed(ForwardArgs<T, W> args) {
  norm_forward_packed<T, W, kPacks, false, kAdds>(args);
}

// ceiling: 168 registers, 128 bytes of shared memory
template <class T, class W, int kPacks, bool kAdds>
__global__ void __launch_bounds__(kMaxThreads) backward_packed(BackwardArgs<T, W> args) {
  norm_backward_packed<T, W, kPacks, false, kAdds>(args);
}

// ceiling: 64 registers, 128 bytes of shared memory
template <class T, class W, bool kAdds>
__global__ void __launch_bounds__(kMaxThreads) forward_any(ForwardArgs<T, W> args) {
  norm_forward_any<T, W, false, kAdds>(args);
}

// ceiling: 80 registers, 128 bytes of shared memory
template <class T, class W, bool kAdds>
__global__ void __launch_bounds__(kMaxThreads) backward_any(BackwardArgs<T, W> args) {
  norm_backward_any<T, W, false, kAdds>(args);
}

// ceiling: 48 registers, 0 bytes of shared memory
template <class W>
__global__ void sum_parts(const float* parts, W* total, int64_t num_blocks, int64_t dim) {
  norm_sum_parts<W>(parts, total, num_blocks, dim);
}

struct Kernels {
  template <class T, class W, int kPacks, bool kAdds>
  static auto forward() {
    if constexpr (kPacks > 0) return &forward_packed<T, W, kPacks, kAdds>;
    else return &forward_any<T, W, kAdds>;
  }
  template <class T, class W, int kPacks, bool kAdds>
  static auto backward() {
    if constexpr (kPacks > 0) return &backward_packed<T, W, kPacks, kAdds>;
    else return &backward_any<T, W, kAdds>;
  }
  template <class W>
  static auto sum() {
    return &sum_parts<W>;
  }
};

}  // namespace

int rms_norm_forward_cuda(Format format, Format weight_format, const NormForwardCuda& in, void* stream) {
  return norm_forward<Kernels>(format, weight_format, in, stream);
}

int rms_norm_backward_cuda(Format format, Format weight_format, const NormBackwardCuda& in, void* stream) {
  return norm_backward<Kernels>(format, weight_format, in, stream);
}

const char* cuda_error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace ml
