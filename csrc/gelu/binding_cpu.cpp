// GELU on the CPU, as operators on tensors.

#include "common/instruction_set.h"
#include "common/tensors.h"
#include "gelu/cpu.h"
#include "swiglu/tensors.h"

using ml::Tensor;

namespace {

Tensor gelu_cpu(const Tensor& x_any, int64_t activation, int64_t isa) {
  const Tensor x = torch::stable::contiguous(x_any);
  const ml::Activation chosen = ml::activation_of(activation);
  Tensor out = ml::fresh_like(x);
  const auto& kernels = ML_KERNELS_WITH_BF16(gelu, isa);
  const ml::Format format = ml::format_of(x);
  const void* x_data = x.const_data_ptr();
  void* out_data = out.mutable_data_ptr();
  torch::stable::parallel_for(0, x.numel(), ml::kCpuNumbersPerTask, [&](int64_t begin, int64_t end) {
    kernels.forward(format, chosen, x_data, out_data, begin, end);
  });
  return out;
}

Tensor gelu_backward_cpu(const Tensor& d_out_any, const Tensor& x_any, int64_t activation, int64_t isa) {
  const Tensor x = torch::stable::contiguous(x_any), d_out = torch::stable::contiguous(d_out_any);
  const ml::Activation chosen = ml::activation_of(activation);
  ml::check_d_out("gelu_backward", d_out, x, x.numel());
  Tensor d_x = ml::fresh_like(x);
  const auto& kernels = ML_KERNELS_WITH_BF16(gelu, isa);
  const ml::Format format = ml::format_of(x);
  const void *d_out_data = d_out.const_data_ptr(), *x_data = x.const_data_ptr();
  void* d_x_data = d_x.mutable_data_ptr();
  torch::stable::parallel_for(0, x.numel(), ml::kCpuNumbersPerTask, [&](int64_t begin, int64_t end) {
    kernels.backward(format, chosen, d_out_data, x_data, d_x_data, begin, end);
  });
  return d_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_lite_cpu, m) {
  m.def("gelu(Tensor x, int activation, int isa=-1) -> Tensor");
  m.def("gelu_backward(Tensor d_out, Tensor x, int activation, int isa=-1) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_lite_cpu, CPU, m) {
  m.impl("gelu", TORCH_BOX(&gelu_cpu));
  m.impl("gelu_backward", TORCH_BOX(&gelu_backward_cpu));
}
