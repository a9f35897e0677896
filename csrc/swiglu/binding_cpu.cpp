// SwiGLU on the CPU, as operators on tensors.

#include "common/instruction_set.h"
#include "common/tensors.h"
#include "swiglu/cpu.h"

using ml::ScalarType;
using ml::Tensor;

namespace {

Tensor swiglu_cpu(const Tensor& gate_up_any, int64_t isa) {
  const Tensor gate_up = torch::stable::contiguous(gate_up_any);
  const int64_t width = gate_up.size(-1), half = width / 2, rows = width > 0 ? gate_up.numel() / width : 0;
  STD_TORCH_CHECK(width % 2 == 0, "swiglu takes gate_up[..., 2F]");
  std::vector<int64_t> shape(gate_up.sizes().begin(), gate_up.sizes().end());
  shape.back() = half;
  Tensor out = torch::stable::new_empty(gate_up, shape);
  const auto& kernels = ML_KERNELS(swiglu, isa);
  const ml::Format format = ml::format_of(gate_up);
  const void* gate_up_data = gate_up.const_data_ptr();
  void* out_data = out.mutable_data_ptr();
  torch::stable::parallel_for(0, rows, ml::grain(width), [&](int64_t begin, int64_t end) {
    kernels.forward(format, gate_up_data, out_data, begin, end, half);
  });
  return out;
}

Tensor swiglu_backward_cpu(const Tensor& d_out_any, const Tensor& gate_up_any, int64_t isa) {
  const Tensor gate_up = torch::stable::contiguous(gate_up_any);
  const Tensor d_out = torch::stable::contiguous(d_out_any);
  const int64_t width = gate_up.size(-1), half = width / 2, rows = width > 0 ? gate_up.numel() / width : 0;
  STD_TORCH_CHECK(width % 2 == 0 && d_out.numel() == rows * half && d_out.scalar_type() == gate_up.scalar_type(),
                  "swiglu_backward takes d_out[..., F] and gate_up[..., 2F] of one dtype");
  Tensor d_gate_up = torch::stable::empty_like(gate_up);
  const auto& kernels = ML_KERNELS(swiglu, isa);
  const ml::Format format = ml::format_of(gate_up);
  const void *d_out_data = d_out.const_data_ptr(), *gate_up_data = gate_up.const_data_ptr();
  void* d_gate_up_data = d_gate_up.mutable_data_ptr();
  torch::stable::parallel_for(0, rows, ml::grain(width), [&](int64_t begin, int64_t end) {
    kernels.backward(format, d_out_data, gate_up_data, d_gate_up_data, begin, end, half);
  });
  return d_gate_up;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_lite_cpu, m) {
  m.def("swiglu(Tensor gate_up, int isa=-1) -> Tensor");
  m.def("swiglu_backward(Tensor d_out, Tensor gate_up, int isa=-1) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_lite_cpu, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu_cpu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward_cpu));
}
