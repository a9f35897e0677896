// Forward and backward of both norms on the CPU, on tensors: rows are shared out to threads, and the parts of the
// gradients of weight and bias are added in a fixed order.
#pragma once

#include "common/norm_tensors.h"

namespace ml {

constexpr int64_t kStreamedFromBytes = int64_t(16) << 20;  // half of a usual L3: it will not be there when read
constexpr int64_t kCpuRowsPerBlock = 32;  // rows whose weight gradient is summed together, whatever the threads

struct NormResult {
  Tensor sum, y, mean, rstd;  // without an addition sum is the input, and for RMSNorm mean is of no use
};

struct NormGradients {
  Tensor dx, dweight, dbias;  // for RMSNorm dbias is of no use
};

// `numbers` in fp32, padded and in the order of `format`.
inline Tensor arranged(const NormCpu& kernels, Format format, const Tensor& numbers_any) {
  const Tensor numbers = torch::stable::contiguous(torch::stable::to(numbers_any, ScalarType::Float));
  Tensor result = torch::stable::new_empty(numbers, {norm_padded(numbers.numel())});
  kernels.arrange(format, floats(numbers), floats(result), numbers.numel());
  return result;
}

// Whether results like `t`, in rows of `dim` numbers, are written past the caches: only whole lines can be.
inline bool norm_streams(const Tensor& t, int64_t dim) {
  const bool in_lines = dim * t.element_size() % 64 == 0;
  return t.numel() * t.element_size() >= kStreamedFromBytes && in_lines;
}

inline bool on_a_line(const void* data) { return reinterpret_cast<uintptr_t>(data) % 64 == 0; }

inline NormResult norm_cpu(const char* op, const NormCpu& kernels, const Tensor& x_any, const Tensor* residual_any,
                           const Tensor& weight_any, const Tensor* bias_any, double eps) {
  const auto [rows, dim] = norm_shape(op, x_any, residual_any, weight_any, bias_any);
  const Format format = format_of(x_any);
  const Tensor x = torch::stable::contiguous(x_any);
  const Tensor residual = residual_any ? torch::stable::contiguous(*residual_any) : x;
  const Tensor weight = arranged(kernels, format, weight_any);
  const Tensor bias = bias_any ? arranged(kernels, format, *bias_any) : weight;
  NormResult result{residual_any ? fresh_like(x) : x, fresh_like(x), rows_like(x, bias_any ? rows : 0),
                    rows_like(x, rows)};
  NormForward args{x.const_data_ptr(), residual_any ? residual.const_data_ptr() : nullptr, floats(weight),
                   bias_any ? floats(bias) : nullptr, residual_any ? result.sum.mutable_data_ptr() : nullptr,
                   result.y.mutable_data_ptr(), floats(result.mean), floats(result.rstd), dim, static_cast<float>(eps),
                   norm_streams(x, dim)};
  args.streams = args.streams && on_a_line(args.sum) && on_a_line(args.y);
  torch::stable::parallel_for(0, rows, grain(dim),
                              [&](int64_t begin, int64_t end) { kernels.forward(format, args, begin, end); });
  return result;
}

inline NormGradients norm_backward_cpu(const char* op, const NormCpu& kernels, const Tensor& dy_any,
                                       const Tensor* dsum_any, const Tensor& input_any, const Tensor& weight_any,
                                       const Tensor* mean, const Tensor& rstd) {
  const auto [rows, dim] = norm_shape(op, input_any, dsum_any, weight_any, nullptr);
  check_norm_backward(op, dy_any, input_any, mean, rstd, rows);
  const Format format = format_of(input_any);
  const Tensor input = torch::stable::contiguous(input_any);
  const Tensor dy = torch::stable::contiguous(dy_any);
  const Tensor dsum = dsum_any ? torch::stable::contiguous(*dsum_any) : dy;
  const Tensor weight = arranged(kernels, format, weight_any);
  const int64_t num_blocks = (rows + kCpuRowsPerBlock - 1) / kCpuRowsPerBlock, padded = norm_padded(dim);
  const int64_t bias_blocks = mean ? num_blocks : 0, bias_dim = mean ? dim : 0;
  NormGradients result{fresh_like(input), torch::stable::new_empty(weight, {dim}),
                       torch::stable::new_empty(weight, {bias_dim})};
  Tensor weight_parts = torch::stable::new_empty(weight, {num_blocks, padded});
  Tensor bias_parts = torch::stable::new_empty(weight, {bias_blocks, padded});
  NormBackward args{dy.const_data_ptr(), dsum_any ? dsum.const_data_ptr() : nullptr, input.const_data_ptr(),
                    floats(weight), mean ? floats(*mean) : nullptr, floats(rstd), result.dx.mutable_data_ptr(), dim,
                    norm_streams(input, dim)};
  args.streams = args.streams && on_a_line(args.dx);
  float *weight_data = floats(weight_parts), *bias_data = floats(bias_parts);
  torch::stable::parallel_for(
      0, num_blocks, grain(kCpuRowsPerBlock * dim), [&, rows = rows, padded = padded](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
          const int64_t row = block * kCpuRowsPerBlock, last = std::min(rows, row + kCpuRowsPerBlock);
          float* bias_part = mean ? bias_data + block * padded : nullptr;
          kernels.backward(format, args, weight_data + block * padded, bias_part, row, last);
        }
      });
  const auto sum = [&, dim = dim](const float* parts, float* total) {
    const int64_t chunks = padded / kNormChunk;
    torch::stable::parallel_for(0, chunks, grain(num_blocks * kNormChunk), [&](int64_t begin, int64_t end) {
      kernels.sum_parts(format, parts, total, num_blocks, dim, begin, end);
    });
  };
  sum(weight_data, floats(result.dweight));
  if (mean) sum(bias_data, floats(result.dbias));
  result.dweight = torch::stable::to(result.dweight, weight_any.scalar_type());
  if (mean) result.dbias = torch::stable::to(result.dbias, weight_any.scalar_type());
  return result;
}

}  // namespace ml
