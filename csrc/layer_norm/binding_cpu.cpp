// LayerNorm on the CPU, as operators on tensors.

#include "common/norm_cpu.h"
#include "layer_norm/cpu.h"

using ml::Tensor;

namespace {

const ml::NormCpu& kernels(int64_t isa) {
#ifdef ML_WITH_AVX512BF16
  if (ml::instruction_set(isa) >= 3) return ml::layer_norm_avx512bf16;
#endif
  return ML_KERNELS(layer_norm, isa);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps,
                                              int64_t isa) {
  const auto result = ml::norm_cpu("layer_norm", kernels(isa), x, nullptr, weight, &bias, eps);
  return {result.y, result.mean, result.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                          const Tensor& bias, double eps, int64_t isa) {
  const auto result = ml::norm_cpu("add_layer_norm", kernels(isa), x, &residual, weight, &bias, eps);
  return {result.sum, result.y, result.mean, result.rstd};
}

Gradients layer_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& mean,
                              const Tensor& rstd, int64_t isa) {
  const auto result =
      ml::norm_backward_cpu("layer_norm_backward", kernels(isa), dy, nullptr, x, weight, &mean, rstd);
  return {result.dx, result.dweight, result.dbias};
}

Gradients add_layer_norm_backward(const Tensor& dy, const Tensor& dsum, const Tensor& sum, const Tensor& weight,
                                  const Tensor& mean, const Tensor& rstd, int64_t isa) {
  const auto result =
      ml::norm_backward_cpu("add_layer_norm_backward", kernels(isa), dy, &dsum, sum, weight, &mean, rstd);
  return {result.dx, result.dweight, result.dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_lite_cpu, m) {
  m.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, int isa=-1)"
        " -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def("add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, int isa=-1)"
        " -> (Tensor sum, Tensor y, Tensor mean, Tensor rstd)");
  m.def("layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd, int isa=-1)"
        " -> (Tensor dx, Tensor dweight, Tensor dbias)");
  m.def("add_layer_norm_backward(Tensor dy, Tensor dsum, Tensor sum, Tensor weight, Tensor mean, Tensor rstd,"
        " int isa=-1) -> (Tensor dx, Tensor dweight, Tensor dbias)");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_lite_cpu, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
  m.impl("add_layer_norm_backward", TORCH_BOX(&add_layer_norm_backward));
}
