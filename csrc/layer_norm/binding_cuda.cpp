// LayerNorm on CUDA, as operators on tensors.

#include "common/norm_tensors_cuda.h"
#include "layer_norm/cuda.h"
#include "rms_norm/cuda.h"

using ml::Tensor;

namespace {

constexpr ml::NormCuda kKernels{ml::layer_norm_forward_cuda, ml::layer_norm_backward_cuda, ml::cuda_error_string};

// `stream` is the cudaStream_t as an integer: reading the current stream takes torch 2.13's ABI, or CUDA headers.
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps,
                                              int64_t stream) {
  const auto result = ml::norm_cuda("layer_norm", kKernels, x, nullptr, weight, &bias, eps, stream);
  return {result.y, result.mean, result.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                          const Tensor& bias, double eps, int64_t stream) {
  const auto result = ml::norm_cuda("add_layer_norm", kKernels, x, &residual, weight, &bias, eps, stream);
  return {result.sum, result.y, result.mean, result.rstd};
}

Gradients layer_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& mean,
                              const Tensor& rstd, int64_t stream) {
  const auto result =
      ml::norm_backward_cuda("layer_norm_backward", kKernels, dy, nullptr, x, weight, &mean, rstd, stream);
  return {result.dx, result.dweight, result.dbias};
}

Gradients add_layer_norm_backward(const Tensor& dy, const Tensor& dsum, const Tensor& sum, const Tensor& weight,
                                  const Tensor& mean, const Tensor& rstd, int64_t stream) {
  const auto result =
      ml::norm_backward_cuda("add_layer_norm_backward", kKernels, dy, &dsum, sum, weight, &mean, rstd, stream);
  return {result.dx, result.dweight, result.dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_lite_cuda, m) {
  m.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, int stream)"
        " -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def("add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, int stream)"
        " -> (Tensor sum, Tensor y, Tensor mean, Tensor rstd)");
  m.def("layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd, int stream)"
        " -> (Tensor dx, Tensor dweight, Tensor dbias)");
  m.def("add_layer_norm_backward(Tensor dy, Tensor dsum, Tensor sum, Tensor weight, Tensor mean, Tensor rstd,"
        " int stream) -> (Tensor dx, Tensor dweight, Tensor dbias)");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_lite_cuda, ML_CUDA_KEY, m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
  m.impl("add_layer_norm_backward", TORCH_BOX(&add_layer_norm_backward));
}
