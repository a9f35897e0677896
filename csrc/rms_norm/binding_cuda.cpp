// RMSNorm on CUDA, as operators on tensors.

#include "common/tensors.h"
#include "rms_norm/cuda.h"

using ml::ScalarType;
using ml::Tensor;

namespace {

struct Shape {
  int64_t rows, dim;
};

Shape shape_of(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() >= 1 && weight.dim() == 1 && x.size(-1) == weight.size(0) && weight.size(0) > 0,
                  "rms_norm takes x[..., D] and weight[D]");
  return {x.numel() / weight.size(0), weight.size(0)};
}

void check_cuda(int code) {
  STD_TORCH_CHECK(code == 0, "rms_norm on CUDA: ", ml::cuda_error_string(code));
}

// `stream` is the cudaStream_t as an integer: reading the current stream takes torch 2.13's ABI, or CUDA headers.
std::tuple<Tensor, Tensor> rms_norm_cuda(const Tensor& x_any, const Tensor& weight_any, double eps, int64_t stream) {
  const auto [rows, dim] = shape_of(x_any, weight_any);
  const Tensor x = torch::stable::contiguous(x_any);
  const Tensor weight = torch::stable::contiguous(weight_any);
  Tensor y = torch::stable::empty_like(x);
  Tensor rstd = ml::rows_like(x, rows);
  check_cuda(ml::rms_norm_forward_cuda(ml::format_of(x), ml::format_of(weight), x.const_data_ptr(), weight.const_data_ptr(),
                                       y.mutable_data_ptr(), static_cast<float*>(rstd.mutable_data_ptr()), rows, dim,
                                       static_cast<float>(eps), reinterpret_cast<void*>(stream)));
  return {y, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward_cuda(const Tensor& dy_any, const Tensor& x_any, const Tensor& weight_any,
                                                  const Tensor& rstd, int64_t stream) {
  const auto [rows, dim] = shape_of(x_any, weight_any);
  const Tensor x = torch::stable::contiguous(x_any);
  const Tensor dy = torch::stable::contiguous(dy_any);
  const Tensor weight = torch::stable::contiguous(weight_any);
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type() && dy.numel() == x.numel() && rstd.numel() == rows,
                  "rms_norm_backward takes dy like x and one rstd a row");
  const int64_t num_blocks = (rows + ml::kCudaRowsPerBlock - 1) / ml::kCudaRowsPerBlock;
  Tensor dx = torch::stable::empty_like(x);
  Tensor parts = torch::stable::new_empty(x, {num_blocks, dim}, ScalarType::Float);
  Tensor dweight = torch::stable::empty_like(weight);
  check_cuda(ml::rms_norm_backward_cuda(
      ml::format_of(x), ml::format_of(weight), dy.const_data_ptr(), x.const_data_ptr(), weight.const_data_ptr(),
      static_cast<const float*>(rstd.const_data_ptr()), dx.mutable_data_ptr(), dweight.mutable_data_ptr(),
      static_cast<float*>(parts.mutable_data_ptr()), rows, dim, reinterpret_cast<void*>(stream)));
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_lite_cuda, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, int stream) -> (Tensor y, Tensor rstd)");
  m.def("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, int stream) -> (Tensor dx, Tensor dweight)");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_lite_cuda, ML_CUDA_KEY, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm_cuda));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward_cuda));
}
