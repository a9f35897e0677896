// Forward and backward of both norms on CUDA, on tensors.
#pragma once

#include "common/norm_cuda.h"
#include "common/norm_tensors.h"

namespace ml {

struct NormCuda {
  int (*forward)(Format format, Format weight_format, const NormForwardCuda& in, void* stream);
  int (*backward)(Format format, Format weight_format, const NormBackwardCuda& in, void* stream);
  const char* (*error_string)(int code);
};

struct NormResult {
  Tensor sum, y, mean, rstd;  // without an addition sum is the input, and for RMSNorm mean is of no use
};

struct NormGradients {
  Tensor dx, dweight, dbias;  // for RMSNorm dbias is of no use
};

inline NormResult norm_cuda(const char* op, const NormCuda& kernels, const Tensor& x_any, const Tensor* residual_any,
                            const Tensor& weight_any, const Tensor* bias_any, double eps, int64_t stream) {
  const auto [rows, dim] = norm_shape(op, x_any, residual_any, weight_any, bias_any);
  const Tensor x = torch::stable::contiguous(x_any);
  const Tensor residual = residual_any ? torch::stable::contiguous(*residual_any) : x;
  const Tensor weight = torch::stable::contiguous(weight_any);
  const Tensor bias = bias_any ? torch::stable::contiguous(*bias_any) : weight;
  NormResult result{residual_any ? torch::stable::empty_like(x) : x, torch::stable::empty_like(x),
                    rows_like(x, bias_any ? rows : 0), rows_like(x, rows)};
  const NormForwardCuda in{x.const_data_ptr(),
                           residual_any ? residual.const_data_ptr() : nullptr,
                           weight.const_data_ptr(),
                           bias_any ? bias.const_data_ptr() : nullptr,
                           residual_any ? result.sum.mutable_data_ptr() : nullptr,
                           result.y.mutable_data_ptr(),
                           floats(result.mean),
                           floats(result.rstd),
                           rows,
                           dim,
                           static_cast<float>(eps)};
  const int code = kernels.forward(format_of(x), format_of(weight), in, reinterpret_cast<void*>(stream));
  STD_TORCH_CHECK(code == 0, op, " on CUDA: ", kernels.error_string(code));
  return result;
}

inline NormGradients norm_backward_cuda(const char* op, const NormCuda& kernels, const Tensor& dy_any,
                                        const Tensor* dsum_any, const Tensor& input_any, const Tensor& weight_any,
                                        const Tensor* mean, const Tensor& rstd, int64_t stream) {
  const auto [rows, dim] = norm_shape(op, input_any, dsum_any, weight_any, nullptr);
  check_norm_backward(op, dy_any, input_any, mean, rstd, rows);
  const Tensor input = torch::stable::contiguous(input_any);
  const Tensor dy = torch::stable::contiguous(dy_any);
  const Tensor dsum = dsum_any ? torch::stable::contiguous(*dsum_any) : dy;
  const Tensor weight = torch::stable::contiguous(weight_any);
  const int64_t num_blocks = (rows + kCudaRowsPerBlock - 1) / kCudaRowsPerBlock, bias_blocks = mean ? num_blocks : 0;
  NormGradients result{torch::stable::empty_like(input), torch::stable::empty_like(weight),
                       torch::stable::empty_like(weight)};
  Tensor weight_parts = torch::stable::new_empty(input, {num_blocks, dim}, ScalarType::Float);
  Tensor bias_parts = torch::stable::new_empty(input, {bias_blocks, dim}, ScalarType::Float);
  const NormBackwardCuda in{dy.const_data_ptr(),
                            dsum_any ? dsum.const_data_ptr() : nullptr,
                            input.const_data_ptr(),
                            weight.const_data_ptr(),
                            mean ? floats(*mean) : nullptr,
                            floats(rstd),
                            result.dx.mutable_data_ptr(),
                            floats(weight_parts),
                            mean ? floats(bias_parts) : nullptr,
                            result.dweight.mutable_data_ptr(),
                            mean ? result.dbias.mutable_data_ptr() : nullptr,
                            rows,
                            dim};
  const int code = kernels.backward(format_of(input), format_of(weight), in, reinterpret_cast<void*>(stream));
  STD_TORCH_CHECK(code == 0, op, " on CUDA: ", kernels.error_string(code));
  return result;
}

}  // namespace ml
