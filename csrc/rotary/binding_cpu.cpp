// Rotary embedding on the CPU, as operators on tensors.

#include "common/instruction_set.h"
#include "common/tensors.h"
#include "rotary/cpu.h"

using ml::ScalarType;
using ml::Tensor;

namespace {

Tensor rotary_cpu(const Tensor& x_any, const Tensor& cos_any, const Tensor& sin_any, bool inverse, int64_t isa) {
  STD_TORCH_CHECK(x_any.dim() == 4 && cos_any.dim() == 3 && sin_any.dim() == 3, "rotary takes x[B,S,H,D], cos[B|1,S,D/2]");
  const Tensor x = x_any.stride(3) == 1 ? x_any : torch::stable::contiguous(x_any);
  const Tensor cos = torch::stable::contiguous(cos_any), sin = torch::stable::contiguous(sin_any);
  const int64_t batch = x.size(0), half = x.size(3) / 2;
  const ml::RotaryShape shape{
      .tokens = x.size(1), .heads = x.size(2), .half = half,
      .batch_stride = x.stride(0), .token_stride = x.stride(1), .head_stride = x.stride(2),
      .angle_batch_stride = cos.size(0) == 1 ? 0 : cos.size(1) * half};
  for (const Tensor& angle : {cos, sin})
    STD_TORCH_CHECK(angle.scalar_type() == ScalarType::Float && (angle.size(0) == batch || angle.size(0) == 1) &&
                        angle.size(0) == cos.size(0) && angle.size(1) == shape.tokens && angle.size(2) == half,
                    "rotary takes fp32 cos and sin of [B or 1, S, D/2]");
  Tensor out = torch::stable::new_empty(x, {batch, shape.tokens, shape.heads, 2 * half});
  const auto& kernels = ML_KERNELS(rotary, isa);
  const ml::Format format = ml::format_of(x);
  const void* x_data = x.const_data_ptr();
  const float* cos_data = static_cast<const float*>(cos.const_data_ptr());
  const float* sin_data = static_cast<const float*>(sin.const_data_ptr());
  void* out_data = out.mutable_data_ptr();
  const int64_t numbers_per_token = std::max<int64_t>(1, shape.heads * 2 * half);
  torch::stable::parallel_for(0, batch * shape.tokens, ml::grain(numbers_per_token), [&](int64_t begin, int64_t end) {
    kernels.rotate(format, shape, x_data, cos_data, sin_data, inverse ? -1.0f : 1.0f, out_data, begin, end);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_lite_cpu, m) {
  m.def("rotary(Tensor x, Tensor cos, Tensor sin, bool inverse, int isa=-1) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_lite_cpu, CPU, m) {
  m.impl("rotary", TORCH_BOX(&rotary_cpu));
}
