// Rotary embedding on the CPU, as operators on tensors.

#include "common/instruction_set.h"
#include "common/tensors.h"
#include "rotary/cpu.h"
#include "rotary/tensors.h"

using ml::Tensor;

namespace {

void rotary_cpu(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool interleaved, bool inverse,
                Tensor& q_out, Tensor& k_out, int64_t isa) {
  const ml::RotaryShape shape = ml::rotary_shape(q, k, cos, sin, interleaved, inverse);
  const ml::RotaryHeads q_heads = ml::rotary_heads(q, q_out), k_heads = ml::rotary_heads(k, k_out);
  const auto& kernels = ML_KERNELS_WITH_BF16(rotary, isa);
  const ml::Format format = ml::format_of(q);
  const float* cos_data = static_cast<const float*>(cos.const_data_ptr());
  const float* sin_data = static_cast<const float*>(sin.const_data_ptr());
  const int64_t numbers_per_token = (q_heads.count + k_heads.count) * shape.dim;
  const int64_t tokens = shape.batch * shape.tokens;
  torch::stable::parallel_for(0, tokens, ml::grain(numbers_per_token), [&](int64_t begin, int64_t end) {
    kernels.rotate(format, shape, q_heads, k_heads, cos_data, sin_data, begin, end);
  });
}

void use_huge_pages(Tensor& fresh) { ml::use_huge_pages(fresh); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_lite_cpu, m) {
  m.def(
      "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool inverse, Tensor(a!) q_out, "
      "Tensor(b!) k_out, int isa=-1) -> ()");
  m.def("use_huge_pages(Tensor(a!) fresh) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_lite_cpu, CPU, m) {
  m.impl("rotary", TORCH_BOX(&rotary_cpu));
  m.impl("use_huge_pages", TORCH_BOX(&use_huge_pages));
}
