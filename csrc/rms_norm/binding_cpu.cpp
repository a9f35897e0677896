// RMSNorm on the CPU, as operators on tensors.

#include "common/instruction_set.h"
#include "common/tensors.h"
#include "rms_norm/cpu.h"

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

constexpr int64_t kCpuRowsPerBlock = 32;  // rows whose weight gradient is summed together, whatever the threads

std::tuple<Tensor, Tensor> rms_norm_cpu(const Tensor& x_any, const Tensor& weight_any, double eps, int64_t isa) {
  const auto [rows, dim] = shape_of(x_any, weight_any);
  const Tensor x = torch::stable::contiguous(x_any);
  const Tensor weight = torch::stable::contiguous(torch::stable::to(weight_any, ScalarType::Float));
  Tensor y = torch::stable::empty_like(x);
  Tensor rstd = ml::rows_like(x, rows);
  const auto& kernels = ML_KERNELS(rms_norm, isa);
  const ml::Format format = ml::format_of(x);
  const void* x_data = x.const_data_ptr();
  const float* weight_data = static_cast<const float*>(weight.const_data_ptr());
  void* y_data = y.mutable_data_ptr();
  float* rstd_data = static_cast<float*>(rstd.mutable_data_ptr());
  torch::stable::parallel_for(0, rows, ml::grain(dim), [&, dim = dim](int64_t begin, int64_t end) {
    kernels.forward(format, x_data, weight_data, y_data, rstd_data, begin, end, dim, static_cast<float>(eps));
  });
  return {y, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward_cpu(const Tensor& dy_any, const Tensor& x_any, const Tensor& weight_any,
                                                 const Tensor& rstd, int64_t isa) {
  const auto [rows, dim] = shape_of(x_any, weight_any);
  const Tensor x = torch::stable::contiguous(x_any);
  const Tensor dy = torch::stable::contiguous(dy_any);
  const Tensor weight = torch::stable::contiguous(torch::stable::to(weight_any, ScalarType::Float));
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type() && dy.numel() == x.numel() && rstd.numel() == rows,
                  "rms_norm_backward takes dy like x and one rstd a row");
  const int64_t num_blocks = (rows + kCpuRowsPerBlock - 1) / kCpuRowsPerBlock;
  Tensor dx = torch::stable::empty_like(x);
  Tensor parts = torch::stable::new_empty(x, {num_blocks, dim}, ScalarType::Float);
  Tensor dweight = torch::stable::new_empty(x, {dim}, ScalarType::Float);
  const auto& kernels = ML_KERNELS(rms_norm, isa);
  const ml::Format format = ml::format_of(x);
  const void *dy_data = dy.const_data_ptr(), *x_data = x.const_data_ptr();
  const float* weight_data = static_cast<const float*>(weight.const_data_ptr());
  const float* rstd_data = static_cast<const float*>(rstd.const_data_ptr());
  void* dx_data = dx.mutable_data_ptr();
  float* parts_data = static_cast<float*>(parts.mutable_data_ptr());
  float* dweight_data = static_cast<float*>(dweight.mutable_data_ptr());
  torch::stable::parallel_for(
      0, num_blocks, ml::grain(kCpuRowsPerBlock * dim), [&, rows = rows, dim = dim](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
          const int64_t row = block * kCpuRowsPerBlock, last = std::min(rows, row + kCpuRowsPerBlock);
          kernels.backward(format, dy_data, x_data, weight_data, rstd_data, dx_data, parts_data + block * dim, row, last,
                           dim);
        }
      });
  torch::stable::parallel_for(0, dim, ml::grain(num_blocks),
                              [&, dim = dim](int64_t begin, int64_t end) {
                                kernels.sum_parts(parts_data, dweight_data, num_blocks, begin, end, dim);
                              });
  return {dx, torch::stable::to(dweight, weight_any.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_lite_cpu, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, int isa=-1) -> (Tensor y, Tensor rstd)");
  m.def("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, int isa=-1) -> (Tensor dx, Tensor dweight)");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_lite_cpu, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm_cpu));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward_cpu));
}
