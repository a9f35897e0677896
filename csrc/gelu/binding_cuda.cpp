// GELU on CUDA, as operators on tensors.

#include "common/cuda_error.h"
#include "common/tensors.h"
#include "gelu/cuda.h"
#include "swiglu/tensors.h"

using ml::Tensor;

namespace {

// `stream` is the cudaStream_t as an integer: reading the current stream takes torch 2.13's ABI, or CUDA headers.
Tensor gelu_cuda(const Tensor& x_any, int64_t activation, int64_t stream) {
  const Tensor x = torch::stable::contiguous(x_any);
  Tensor out = torch::stable::empty_like(x);
  ml::check_cuda("gelu", ml::gelu_forward_cuda(ml::format_of(x), ml::activation_of(activation), x.const_data_ptr(),
                                               out.mutable_data_ptr(), x.numel(), reinterpret_cast<void*>(stream)));
  return out;
}

Tensor gelu_backward_cuda(const Tensor& d_out_any, const Tensor& x_any, int64_t activation, int64_t stream) {
  const Tensor x = torch::stable::contiguous(x_any), d_out = torch::stable::contiguous(d_out_any);
  ml::check_d_out("gelu_backward", d_out, x, x.numel());
  Tensor d_x = torch::stable::empty_like(x);
  ml::check_cuda("gelu", ml::gelu_backward_cuda(ml::format_of(x), ml::activation_of(activation), d_out.const_data_ptr(),
                                                x.const_data_ptr(), d_x.mutable_data_ptr(), x.numel(),
                                                reinterpret_cast<void*>(stream)));
  return d_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_lite_cuda, m) {
  m.def("gelu(Tensor x, int activation, int stream) -> Tensor");
  m.def("gelu_backward(Tensor d_out, Tensor x, int activation, int stream) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_lite_cuda, ML_CUDA_KEY, m) {
  m.impl("gelu", TORCH_BOX(&gelu_cuda));
  m.impl("gelu_backward", TORCH_BOX(&gelu_backward_cuda));
}
