// RMSNorm on CUDA, forward and backward; see cpu.cpp for the equations. Arithmetic is fp32 whatever the format.
//
// A row is read once: each thread keeps kPacks 16-byte packs of it in registers between the sum and the scaling. Rows
// that are too long for that, or do not lie on 16-byte boundaries, take the kernels `*_any`, which read a row twice. The weight's gradient has two stages, both in a fixed order: a thread block sums its
// kCudaRowsPerBlock rows, then one thread a column adds the blocks' sums.

#include "common/cuda.cuh"
#include "rms_norm/cuda.h"

namespace ml {
namespace {

// Leaves 168 registers a thread: four packs of x, dy and the weight gradient fit without spills.
constexpr int kMaxThreads = 384;

template <class T, class W, int kPacks>
__global__ void __launch_bounds__(kMaxThreads)
    forward_packed(const T* __restrict__ x, const W* __restrict__ weight, T* __restrict__ y, float* __restrict__ rstd,
                   int64_t dim, float eps) {
  constexpr int kSize = kPackSize<T>;
  __shared__ float scratch[32];
  const int64_t row = blockIdx.x;
  const int num_packs = dim / kSize;
  const auto* x_row = reinterpret_cast<const Pack<T>*>(x + row * dim);
  const auto* weight_packs = reinterpret_cast<const Pack<W, kSize>*>(weight);
  auto* y_row = reinterpret_cast<Pack<T>*>(y + row * dim);
  Pack<T> held[kPacks];
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int pack = threadIdx.x + k * blockDim.x;
    if (pack >= num_packs) break;
    held[k] = x_row[pack];
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum += to_float(held[k].values[i]) * to_float(held[k].values[i]);
  }
  const float r = rsqrtf(block_sum(sum, scratch) / dim + eps);
  if (threadIdx.x == 0) rstd[row] = r;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int pack = threadIdx.x + k * blockDim.x;
    if (pack >= num_packs) break;
    const auto w = weight_packs[pack];
    Pack<T> out;
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      out.values[i] = from_float<T>(to_float(held[k].values[i]) * r * to_float(w.values[i]));
    y_row[pack] = out;
  }
}

template <class T, class W, int kPacks>
__global__ void __launch_bounds__(kMaxThreads)
    backward_packed(const T* __restrict__ dy, const T* __restrict__ x, const W* __restrict__ weight,
                    const float* __restrict__ rstd, T* __restrict__ dx, float* __restrict__ weight_parts, int64_t rows,
                    int64_t dim) {
  constexpr int kSize = kPackSize<T>;
  __shared__ float scratch[32];
  const int num_packs = dim / kSize;
  const int64_t begin = blockIdx.x * kCudaRowsPerBlock;
  const int64_t end = min(rows, begin + kCudaRowsPerBlock);
  const auto* weight_packs = reinterpret_cast<const Pack<W, kSize>*>(weight);
  auto* part = reinterpret_cast<Pack<float, kSize>*>(weight_parts + blockIdx.x * dim);
  Pack<float, kSize> dw[kPacks] = {};
  for (int64_t row = begin; row < end; ++row) {
    const auto* x_row = reinterpret_cast<const Pack<T>*>(x + row * dim);
    const auto* dy_row = reinterpret_cast<const Pack<T>*>(dy + row * dim);
    auto* dx_row = reinterpret_cast<Pack<T>*>(dx + row * dim);
    const float r = rstd[row];
    Pack<T> x_held[kPacks], dy_held[kPacks];
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int pack = threadIdx.x + k * blockDim.x;
      if (pack >= num_packs) break;
      x_held[k] = x_row[pack];
      dy_held[k] = dy_row[pack];
      const auto w = weight_packs[pack];
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float n = to_float(x_held[k].values[i]) * r, up = to_float(dy_held[k].values[i]);
        sum += up * to_float(w.values[i]) * n;
        dw[k].values[i] += up * n;
      }
    }
    const float mean = block_sum(sum, scratch) / dim;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int pack = threadIdx.x + k * blockDim.x;
      if (pack >= num_packs) break;
      const auto w = weight_packs[pack];
      Pack<T> out;
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float n = to_float(x_held[k].values[i]) * r;
        const float g = to_float(dy_held[k].values[i]) * to_float(w.values[i]);
        out.values[i] = from_float<T>((g - n * mean) * r);
      }
      dx_row[pack] = out;
    }
  }
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int pack = threadIdx.x + k * blockDim.x;
    if (pack >= num_packs) break;
    part[pack] = dw[k];
  }
}

template <class T, class W>
__global__ void __launch_bounds__(kMaxThreads)
    forward_any(const T* __restrict__ x, const W* __restrict__ weight, T* __restrict__ y, float* __restrict__ rstd,
                int64_t dim, float eps) {
  __shared__ float scratch[32];
  const T* x_row = x + blockIdx.x * dim;
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) sum += to_float(x_row[i]) * to_float(x_row[i]);
  const float r = rsqrtf(block_sum(sum, scratch) / dim + eps);
  if (threadIdx.x == 0) rstd[blockIdx.x] = r;
  for (int64_t i = threadIdx.x; i < dim; i += blockDim.x)
    y[blockIdx.x * dim + i] = from_float<T>(to_float(x_row[i]) * r * to_float(weight[i]));
}

template <class T, class W>
__global__ void __launch_bounds__(kMaxThreads)
    backward_any(const T* __restrict__ dy, const T* __restrict__ x, const W* __restrict__ weight,
                 const float* __restrict__ rstd, T* __restrict__ dx, float* __restrict__ weight_parts, int64_t rows,
                 int64_t dim) {
  __shared__ float scratch[32];
  float* part = weight_parts + blockIdx.x * dim;  // column i belongs to one thread, which adds the rows in order
  for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) part[i] = 0.0f;
  const int64_t begin = blockIdx.x * kCudaRowsPerBlock;
  const int64_t end = min(rows, begin + kCudaRowsPerBlock);
  for (int64_t row = begin; row < end; ++row) {
    const T *x_row = x + row * dim, *dy_row = dy + row * dim;
    const float r = rstd[row];
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < dim; i += blockDim.x)
      sum += to_float(dy_row[i]) * to_float(weight[i]) * (to_float(x_row[i]) * r);
    const float mean = block_sum(sum, scratch) / dim;
    for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) {
      const float n = to_float(x_row[i]) * r, up = to_float(dy_row[i]);
      part[i] += up * n;
      dx[row * dim + i] = from_float<T>((up * to_float(weight[i]) - n * mean) * r);
    }
  }
}

template <class W>
__global__ void sum_parts(const float* __restrict__ weight_parts, W* __restrict__ dweight, int64_t num_blocks,
                          int64_t dim) {
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= dim) return;
  double sum = 0.0;
  for (int64_t block = 0; block < num_blocks; ++block) sum += weight_parts[block * dim + column];
  dweight[column] = from_float<W>(static_cast<float>(sum));
}

// ---- launchers

// How a row is spread: `packs` 16-byte packs in each of `threads` threads; packs = 0 means the kernels for any length.
struct Spread {
  int packs, threads;
};

template <class T>
Spread spread_of(int64_t dim, bool aligned) {
  constexpr int kSize = kPackSize<T>;
  const int64_t num_packs = dim / kSize;
  if (!aligned || dim % kSize != 0 || num_packs > 4 * kMaxThreads) return {0, kMaxThreads};
  const int packs = num_packs <= 128 ? 1 : num_packs <= 512 ? 2 : 4;
  const int64_t threads = (num_packs + packs - 1) / packs;
  return {packs, static_cast<int>((threads + 31) / 32 * 32)};
}

template <class T, class W>
void launch_forward(const void* x_, const void* weight_, void* y_, float* rstd, int64_t rows, int64_t dim, float eps,
                    cudaStream_t stream) {
  const auto* x = static_cast<const T*>(x_);
  const auto* weight = static_cast<const W*>(weight_);
  auto* y = static_cast<T*>(y_);
  const Spread spread = spread_of<T>(dim, on_16_bytes(x, weight, y));
  const auto grid = static_cast<unsigned>(rows);
  switch (spread.packs) {
    case 1: launch(forward_packed<T, W, 1>, grid, spread.threads, 0, stream, x, weight, y, rstd, dim, eps); break;
    case 2: launch(forward_packed<T, W, 2>, grid, spread.threads, 0, stream, x, weight, y, rstd, dim, eps); break;
    case 4: launch(forward_packed<T, W, 4>, grid, spread.threads, 0, stream, x, weight, y, rstd, dim, eps); break;
    default: launch(forward_any<T, W>, grid, spread.threads, 0, stream, x, weight, y, rstd, dim, eps);
  }
}

template <class T, class W>
void launch_backward(const void* dy_, const void* x_, const void* weight_, const float* rstd, void* dx_, void* dweight,
                     float* parts, int64_t rows, int64_t dim, cudaStream_t stream) {
  const auto* dy = static_cast<const T*>(dy_);
  const auto* x = static_cast<const T*>(x_);
  const auto* weight = static_cast<const W*>(weight_);
  auto* dx = static_cast<T*>(dx_);
  const Spread spread = spread_of<T>(dim, on_16_bytes(dy, x, weight, dx, parts));
  const int64_t num_blocks = (rows + kCudaRowsPerBlock - 1) / kCudaRowsPerBlock;
  const auto grid = static_cast<unsigned>(num_blocks);
  const int threads = spread.threads;
  switch (num_blocks > 0 ? spread.packs : -1) {
    case -1: break;  // no rows: the gradient of the weight is zero, and a grid of no blocks is an error
    case 1: launch(backward_packed<T, W, 1>, grid, threads, 0, stream, dy, x, weight, rstd, dx, parts, rows, dim); break;
    case 2: launch(backward_packed<T, W, 2>, grid, threads, 0, stream, dy, x, weight, rstd, dx, parts, rows, dim); break;
    case 4: launch(backward_packed<T, W, 4>, grid, threads, 0, stream, dy, x, weight, rstd, dx, parts, rows, dim); break;
    default: launch(backward_any<T, W>, grid, threads, 0, stream, dy, x, weight, rstd, dx, parts, rows, dim);
  }
  const auto columns = static_cast<unsigned>((dim + 127) / 128);
  launch(sum_parts<W>, columns, 128, 0, stream, parts, static_cast<W*>(dweight), num_blocks, dim);
}

// Calls `launch` with the two formats as types. The weight is of x's format, or fp32.
template <class Launch>
int with_types(Format format, Format weight_format, Launch launch) {
  if (format != weight_format && weight_format != Format::kFp32) return cudaErrorInvalidValue;
  const bool wide_weight = weight_format == Format::kFp32;
  switch (format) {
    case Format::kFp32: launch(float{}, float{}); break;
    case Format::kBf16: wide_weight ? launch(__nv_bfloat16{}, float{}) : launch(__nv_bfloat16{}, __nv_bfloat16{}); break;
    case Format::kFp16: wide_weight ? launch(__half{}, float{}) : launch(__half{}, __half{}); break;
  }
  return cudaGetLastError();
}

}  // namespace

int rms_norm_forward_cuda(Format format, Format weight_format, const void* x, const void* weight, void* y, float* rstd,
                          int64_t rows, int64_t dim, float eps, void* stream) {
  if (rows == 0) return cudaSuccess;
  return with_types(format, weight_format, [&](auto t, auto w) {
    launch_forward<decltype(t), decltype(w)>(x, weight, y, rstd, rows, dim, eps, static_cast<cudaStream_t>(stream));
  });
}

int rms_norm_backward_cuda(Format format, Format weight_format, const void* dy, const void* x, const void* weight,
                           const float* rstd, void* dx, void* dweight, float* weight_parts, int64_t rows, int64_t dim,
                           void* stream) {
  return with_types(format, weight_format, [&](auto t, auto w) {
    launch_backward<decltype(t), decltype(w)>(dy, x, weight, rstd, dx, dweight, weight_parts, rows, dim,
                                              static_cast<cudaStream_t>(stream));
  });
}

const char* cuda_error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace ml
