// Gated activations on CUDA, as operators on tensors.

#include "common/cuda_error.h"
#include "common/tensors.h"
#include "swiglu/cuda.h"
#include "swiglu/tensors.h"

using ml::Tensor;

namespace {

// `stream` is the cudaStream_t as an integer: reading the current stream takes torch 2.13's ABI, or CUDA headers.
Tensor swiglu_cuda(const Tensor& gate_up_any, int64_t activation, int64_t stream) {
  const Tensor gate_up = torch::stable::contiguous(gate_up_any);
  const auto [rows, half] = ml::gated_shape(gate_up);
  Tensor out = ml::gated_output(gate_up);
  ml::check_cuda("swiglu", ml::swiglu_forward_cuda(ml::format_of(gate_up), ml::activation_of(activation),
                                                   gate_up.const_data_ptr(), out.mutable_data_ptr(), rows, half,
                                                   reinterpret_cast<void*>(stream)));
  return out;
}

Tensor swiglu_backward_cuda(const Tensor& d_out_any, const Tensor& gate_up_any, int64_t activation, int64_t stream) {
  const Tensor gate_up = torch::stable::contiguous(gate_up_any), d_out = torch::stable::contiguous(d_out_any);
  const auto [rows, half] = ml::gated_shape(gate_up);
  ml::check_d_out("swiglu_backward", d_out, gate_up, rows * half);
  Tensor d_gate_up = torch::stable::empty_like(gate_up);
  ml::check_cuda("swiglu", ml::swiglu_backward_cuda(ml::format_of(gate_up), ml::activation_of(activation),
                                                    d_out.const_data_ptr(), gate_up.const_data_ptr(),
                                                    d_gate_up.mutable_data_ptr(), rows, half,
                                                    reinterpret_cast<void*>(stream)));
  return d_gate_up;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_lite_cuda, m) {
  m.def("swiglu(Tensor gate_up, int activation, int stream) -> Tensor");
  m.def("swiglu_backward(Tensor d_out, Tensor gate_up, int activation, int stream) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_lite_cuda, ML_CUDA_KEY, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu_cuda));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward_cuda));
}
