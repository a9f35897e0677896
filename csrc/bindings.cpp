// The one file that knows tensors: registers the kernels as operators through torch's stable ABI (torch 2.11 and up).
//
// Autograd, fake kernels and dispatch between devices are registered in Python (megatron_lite/ops), on top of these.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "accumulate/cpu.h"
#include "block_squares/cpu.h"
#include "rms_norm/cpu.h"
#include "rotary/cpu.h"
#include "swiglu/cpu.h"
#ifdef ML_WITH_CUDA
#include "rms_norm/cuda.h"
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

ml::Format format_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return ml::Format::kFp32;
    case ScalarType::BFloat16: return ml::Format::kBf16;
    case ScalarType::Half: return ml::Format::kFp16;
    default: STD_TORCH_CHECK(false, "the kernel takes fp32, bf16 and fp16");
  }
}

Tensor rows_like(const Tensor& x, int64_t rows) { return torch::stable::new_empty(x, {rows}, ScalarType::Float); }

struct Shape {
  int64_t rows, dim;
};

Shape shape_of(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() >= 1 && weight.dim() == 1 && x.size(-1) == weight.size(0) && weight.size(0) > 0,
                  "rms_norm takes x[..., D] and weight[D]");
  return {x.numel() / weight.size(0), weight.size(0)};
}

// ---- CPU

// The best instruction set that this CPU and this build have: 0 portable, 1 AVX2, 2 AVX-512. Tests lower the choice by
// `requested`; -1 is the best.
int64_t instruction_set(int64_t requested) {
  int64_t best = 0;
#ifdef ML_WITH_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = 1;
#endif
#ifdef ML_WITH_AVX512
  if (best == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    best = 2;
#endif
  return requested < 0 ? best : std::min(best, requested);
}

#if defined(ML_WITH_AVX512) && defined(ML_WITH_AVX2)
#define ML_KERNELS(op, isa)                                                 \
  (instruction_set(isa) == 2 ? ml::op##_avx512                              \
                             : instruction_set(isa) == 1 ? ml::op##_avx2 : ml::op##_portable)
#else
#define ML_KERNELS(op, isa) ((void)instruction_set(isa), ml::op##_portable)
#endif

constexpr int64_t kCpuRowsPerBlock = 32;   // rows whose weight gradient is summed together, whatever the threads
constexpr int64_t kCpuNumbersPerTask = 1 << 15;  // below this, a second thread costs more than it brings

int64_t grain(int64_t numbers_per_item) { return std::max<int64_t>(1, kCpuNumbersPerTask / numbers_per_item); }

std::tuple<Tensor, Tensor> rms_norm_cpu(const Tensor& x_any, const Tensor& weight_any, double eps, int64_t isa) {
  const auto [rows, dim] = shape_of(x_any, weight_any);
  const Tensor x = torch::stable::contiguous(x_any);
  const Tensor weight = torch::stable::contiguous(torch::stable::to(weight_any, ScalarType::Float));
  Tensor y = torch::stable::empty_like(x);
  Tensor rstd = rows_like(x, rows);
  const auto& kernels = ML_KERNELS(rms_norm, isa);
  const ml::Format format = format_of(x);
  const void* x_data = x.const_data_ptr();
  const float* weight_data = static_cast<const float*>(weight.const_data_ptr());
  void* y_data = y.mutable_data_ptr();
  float* rstd_data = static_cast<float*>(rstd.mutable_data_ptr());
  torch::stable::parallel_for(0, rows, grain(dim), [&, dim = dim](int64_t begin, int64_t end) {
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
  const ml::Format format = format_of(x);
  const void *dy_data = dy.const_data_ptr(), *x_data = x.const_data_ptr();
  const float* weight_data = static_cast<const float*>(weight.const_data_ptr());
  const float* rstd_data = static_cast<const float*>(rstd.const_data_ptr());
  void* dx_data = dx.mutable_data_ptr();
  float* parts_data = static_cast<float*>(parts.mutable_data_ptr());
  float* dweight_data = static_cast<float*>(dweight.mutable_data_ptr());
  torch::stable::parallel_for(
      0, num_blocks, grain(kCpuRowsPerBlock * dim), [&, rows = rows, dim = dim](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
          const int64_t row = block * kCpuRowsPerBlock, last = std::min(rows, row + kCpuRowsPerBlock);
          kernels.backward(format, dy_data, x_data, weight_data, rstd_data, dx_data, parts_data + block * dim, row, last,
                           dim);
        }
      });
  torch::stable::parallel_for(0, dim, grain(std::max<int64_t>(1, num_blocks)),
                              [&, dim = dim](int64_t begin, int64_t end) {
                                kernels.sum_parts(parts_data, dweight_data, num_blocks, begin, end, dim);
                              });
  return {dx, torch::stable::to(dweight, weight_any.scalar_type())};
}

Tensor swiglu_cpu(const Tensor& gate_up_any, int64_t isa) {
  const Tensor gate_up = torch::stable::contiguous(gate_up_any);
  const int64_t width = gate_up.size(-1), half = width / 2, rows = width > 0 ? gate_up.numel() / width : 0;
  STD_TORCH_CHECK(width % 2 == 0, "swiglu takes gate_up[..., 2F]");
  std::vector<int64_t> shape(gate_up.sizes().begin(), gate_up.sizes().end());
  shape.back() = half;
  Tensor out = torch::stable::new_empty(gate_up, shape);
  const auto& kernels = ML_KERNELS(swiglu, isa);
  const ml::Format format = format_of(gate_up);
  const void* gate_up_data = gate_up.const_data_ptr();
  void* out_data = out.mutable_data_ptr();
  torch::stable::parallel_for(0, rows, grain(std::max<int64_t>(1, width)), [&](int64_t begin, int64_t end) {
    kernels.forward(format, gate_up_data, out_data, begin, end, half);
  });
  return out;
}

Tensor swiglu_backward_cpu(const Tensor& d_out_any, const Tensor& gate_up_any, int64_t isa) {
  const Tensor gate_up = torch::stable::contiguous(gate_up_any);
  const Tensor d_out = torch::stable::contiguous(d_out_any);
  const int64_t width = gate_up.size(-1), half = width / 2, rows = width > 0 ? gate_up.numel() / width : 0;
  STD_TORCH_CHECK(width % 2 == 0 && d_out.numel() == rows * half && d_out.scalar_type() == gate_up.scalar_type(),
                  "swiglu_backward takes d_out[..., F] and gate_up[..., 2F] of one dtype");
  Tensor d_gate_up = torch::stable::empty_like(gate_up);
  const auto& kernels = ML_KERNELS(swiglu, isa);
  const ml::Format format = format_of(gate_up);
  const void *d_out_data = d_out.const_data_ptr(), *gate_up_data = gate_up.const_data_ptr();
  void* d_gate_up_data = d_gate_up.mutable_data_ptr();
  torch::stable::parallel_for(0, rows, grain(std::max<int64_t>(1, width)), [&](int64_t begin, int64_t end) {
    kernels.backward(format, d_out_data, gate_up_data, d_gate_up_data, begin, end, half);
  });
  return d_gate_up;
}

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
  const ml::Format format = format_of(x);
  const void* x_data = x.const_data_ptr();
  const float* cos_data = static_cast<const float*>(cos.const_data_ptr());
  const float* sin_data = static_cast<const float*>(sin.const_data_ptr());
  void* out_data = out.mutable_data_ptr();
  const int64_t numbers_per_token = std::max<int64_t>(1, shape.heads * 2 * half);
  torch::stable::parallel_for(0, batch * shape.tokens, grain(numbers_per_token), [&](int64_t begin, int64_t end) {
    kernels.rotate(format, shape, x_data, cos_data, sin_data, inverse ? -1.0f : 1.0f, out_data, begin, end);
  });
  return out;
}

Tensor block_squares_cpu(const Tensor& values, int64_t isa) {
  STD_TORCH_CHECK(values.dim() == 1 && values.stride(0) == 1 && values.size(0) % ml::kSquaresPerBlock == 0 &&
                      values.scalar_type() == ScalarType::Float,
                  "block_squares takes contiguous fp32 values, a multiple of 256 of them");
  const int64_t blocks = values.size(0) / ml::kSquaresPerBlock;
  Tensor sums = torch::stable::new_empty(values, {blocks}, ScalarType::Double);
  const auto& kernels = ML_KERNELS(block_squares, isa);
  const float* values_data = static_cast<const float*>(values.const_data_ptr());
  double* sums_data = static_cast<double*>(sums.mutable_data_ptr());
  torch::stable::parallel_for(0, blocks, grain(ml::kSquaresPerBlock), [&](int64_t begin, int64_t end) {
    kernels.sum(values_data, sums_data, begin, end);
  });
  return sums;
}

void accumulate_cpu(Tensor& total, const Tensor& values_any, int64_t isa) {
  const Tensor values = torch::stable::contiguous(values_any);
  STD_TORCH_CHECK(total.is_contiguous() && total.scalar_type() == ScalarType::Float && total.numel() == values.numel(),
                  "accumulate takes a contiguous fp32 total and as many values");
  const auto& kernels = ML_KERNELS(accumulate, isa);
  const ml::Format format = format_of(values);
  float* total_data = static_cast<float*>(total.mutable_data_ptr());
  const void* values_data = values.const_data_ptr();
  torch::stable::parallel_for(0, total.numel(), kCpuNumbersPerTask, [&](int64_t begin, int64_t end) {
    kernels.add(format, total_data, values_data, begin, end);
  });
}

// ---- CUDA

#ifdef ML_WITH_CUDA
void check_cuda(int code) {
  STD_TORCH_CHECK(code == 0, "rms_norm on CUDA: ", ml::cuda_error_string(code));
}

// `stream` is the cudaStream_t as an integer: reading the current stream takes torch 2.13's ABI, or CUDA headers.
std::tuple<Tensor, Tensor> rms_norm_cuda(const Tensor& x_any, const Tensor& weight_any, double eps, int64_t stream) {
  const auto [rows, dim] = shape_of(x_any, weight_any);
  const Tensor x = torch::stable::contiguous(x_any);
  const Tensor weight = torch::stable::contiguous(weight_any);
  Tensor y = torch::stable::empty_like(x);
  Tensor rstd = rows_like(x, rows);
  check_cuda(ml::rms_norm_forward_cuda(format_of(x), format_of(weight), x.const_data_ptr(), weight.const_data_ptr(),
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
      format_of(x), format_of(weight), dy.const_data_ptr(), x.const_data_ptr(), weight.const_data_ptr(),
      static_cast<const float*>(rstd.const_data_ptr()), dx.mutable_data_ptr(), dweight.mutable_data_ptr(),
      static_cast<float*>(parts.mutable_data_ptr()), rows, dim, reinterpret_cast<void*>(stream)));
  return {dx, dweight};
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY(megatron_lite_cpu, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, int isa=-1) -> (Tensor y, Tensor rstd)");
  m.def("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, int isa=-1) -> (Tensor dx, Tensor dweight)");
  m.def("swiglu(Tensor gate_up, int isa=-1) -> Tensor");
  m.def("swiglu_backward(Tensor d_out, Tensor gate_up, int isa=-1) -> Tensor");
  m.def("accumulate(Tensor(a!) total, Tensor values, int isa=-1) -> ()");
  m.def("block_squares(Tensor values, int isa=-1) -> Tensor");
  m.def("rotary(Tensor x, Tensor cos, Tensor sin, bool inverse, int isa=-1) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_lite_cpu, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm_cpu));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward_cpu));
  m.impl("swiglu", TORCH_BOX(&swiglu_cpu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward_cpu));
  m.impl("accumulate", TORCH_BOX(&accumulate_cpu));
  m.impl("block_squares", TORCH_BOX(&block_squares_cpu));
  m.impl("rotary", TORCH_BOX(&rotary_cpu));
}

#ifdef ML_WITH_CUDA
STABLE_TORCH_LIBRARY(megatron_lite_cuda, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, int stream) -> (Tensor y, Tensor rstd)");
  m.def("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, int stream) -> (Tensor dx, Tensor dweight)");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_lite_cuda, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm_cuda));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward_cuda));
}
#endif
