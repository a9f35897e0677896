// RMSNorm on CUDA, as operators on tensors.

#include "common/norm_tensors_cuda.h"
#include "rms_norm/cuda.h"

using ml::Tensor;

namespace {

constexpr ml::NormCuda kKernels{ml::rms_norm_forward_cuda, ml::rms_norm_backward_cuda, ml::cuda_error_string};

// `stream` is the cudaStream_t as an integer: reading the current stream takes torch 2.13's ABI, or CUDA headers.
std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps, int64_t stream) {
  const auto result = ml::norm_cuda("rms_norm", kKernels, x, nullptr, weight, nullptr, eps, stream);
  return {result.y, result.rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                double eps, int64_t stream) {
  const auto result = ml::norm_cuda("add_rms_norm", kKernels, x, &residual, weight, nullptr, eps, stream);
  return {result.sum, result.y, result.rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                             const Tensor& rstd, int64_t stream) {
  const auto result =
      ml::norm_backward_cuda("rms_norm_backward", kKernels, dy, nullptr, x, weight, nullptr, rstd, stream);
  return {result.dx, result.dweight};
}

std::tuple<Tensor, Tensor> add_rms_norm_backward(const Tensor& dy, const Tensor& dsum, const Tensor& sum,
                                                 const Tensor& weight, const Tensor& rstd, int64_t stream) {
  const auto result =
      ml::norm_backward_cuda("add_rms_norm_backward", kKernels, dy, &dsum, sum, weight, nullptr, rstd, stream);
  return {result.dx, result.dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_lite_cuda, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, int stream) -> (Tensor y, Tensor rstd)");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, int stream)"
        " -> (Tensor sum, Tensor y, Tensor rstd)");
  m.def("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, int stream)"
        " -> (Tensor dx, Tensor dweight)");
  m.def("add_rms_norm_backward(Tensor dy, Tensor dsum, Tensor sum, Tensor weight, Tensor rstd, int stream)"
        " -> (Tensor dx, Tensor dweight)");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_lite_cuda, ML_CUDA_KEY, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("add_rms_norm_backward", TORCH_BOX(&add_rms_norm_backward));
}
