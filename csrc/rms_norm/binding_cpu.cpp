// RMSNorm on the CPU, as operators on tensors.

#include "common/norm_cpu.h"
#include "rms_norm/cpu.h"

using ml::Tensor;

namespace {

const ml::NormCpu& kernels(int64_t isa) {
#ifdef ML_WITH_AVX512BF16
  if (ml::instruction_set(isa) >= 3) return ml::rms_norm_avx512bf16;
#endif
  return ML_KERNELS(rms_norm, isa);
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps, int64_t isa) {
  const auto result = ml::norm_cpu("rms_norm", kernels(isa), x, nullptr, weight, nullptr, eps);
  return {result.y, result.rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                double eps, int64_t isa) {
  const auto result = ml::norm_cpu("add_rms_norm", kernels(isa), x, &residual, weight, nullptr, eps);
  return {result.sum, result.y, result.rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                             const Tensor& rstd, int64_t isa) {
  const auto result =
      ml::norm_backward_cpu("rms_norm_backward", kernels(isa), dy, nullptr, x, weight, nullptr, rstd);
  return {result.dx, result.dweight};
}

std::tuple<Tensor, Tensor> add_rms_norm_backward(const Tensor& dy, const Tensor& dsum, const Tensor& sum,
                                                 const Tensor& weight, const Tensor& rstd, int64_t isa) {
  const auto result =
      ml::norm_backward_cpu("add_rms_norm_backward", kernels(isa), dy, &dsum, sum, weight, nullptr, rstd);
  return {result.dx, result.dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_lite_cpu, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, int isa=-1) -> (Tensor y, Tensor rstd)");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, int isa=-1)"
        " -> (Tensor sum, Tensor y, Tensor rstd)");
  m.def("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, int isa=-1)"
        " -> (Tensor dx, Tensor dweight)");
  m.def("add_rms_norm_backward(Tensor dy, Tensor dsum, Tensor sum, Tensor weight, Tensor rstd, int isa=-1)"
        " -> (Tensor dx, Tensor dweight)");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_lite_cpu, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("add_rms_norm_backward", TORCH_BOX(&add_rms_norm_backward));
}
