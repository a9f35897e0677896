// Gated activations on the CPU, as operators on tensors.

#include "common/instruction_set.h"
#include "common/tensors.h"
#include "swiglu/cpu.h"
#include "swiglu/tensors.h"

using ml::Tensor;

namespace {

Tensor swiglu_cpu(const Tensor& gate_up_any, int64_t activation, int64_t isa) {
  const Tensor gate_up = torch::stable::contiguous(gate_up_any);
  const auto [rows, half] = ml::gated_shape(gate_up);
  Tensor out = ml::gated_output(gate_up);
  ml::use_huge_pages(out);
  const auto& kernels = ML_KERNELS_WITH_BF16(swiglu, isa);
  const ml::Format format = ml::format_of(gate_up);
  const ml::Activation chosen = ml::activation_of(activation);
  const void* gate_up_data = gate_up.const_data_ptr();
  void* out_data = out.mutable_data_ptr();
  torch::stable::parallel_for(0, rows, ml::grain(2 * half), [&, half = half](int64_t begin, int64_t end) {
    kernels.forward(format, chosen, gate_up_data, out_data, begin, end, half);
  });
  return out;
}

Tensor swiglu_backward_cpu(const Tensor& d_out_any, const Tensor& gate_up_any, int64_t activation, int64_t isa) {
  const Tensor gate_up = torch::stable::contiguous(gate_up_any);
  const Tensor d_out = torch::stable::contiguous(d_out_any);
  const auto [rows, half] = ml::gated_shape(gate_up);
  ml::check_d_out("swiglu_backward", d_out, gate_up, rows * half);
  Tensor d_gate_up = ml::fresh_like(gate_up);
  const auto& kernels = ML_KERNELS_WITH_BF16(swiglu, isa);
  const ml::Format format = ml::format_of(gate_up);
  const ml::Activation chosen = ml::activation_of(activation);
  const void *d_out_data = d_out.const_data_ptr(), *gate_up_data = gate_up.const_data_ptr();
  void* d_gate_up_data = d_gate_up.mutable_data_ptr();
  torch::stable::parallel_for(0, rows, ml::grain(2 * half), [&, half = half](int64_t begin, int64_t end) {
    kernels.backward(format, chosen, d_out_data, gate_up_data, d_gate_up_data, begin, end, half);
  });
  return d_gate_up;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_lite_cpu, m) {
  m.def("swiglu(Tensor gate_up, int activation, int isa=-1) -> Tensor");
  m.def("swiglu_backward(Tensor d_out, Tensor gate_up, int activation, int isa=-1) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_lite_cpu, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu_cpu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward_cpu));
}
