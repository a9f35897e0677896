// RMSNorm and LayerNorm on CUDA, with and without an addition before them; norm_launch.cuh launches these kernels. See
// norm_rows.h for the equations; kCentred is LayerNorm. Arithmetic is fp32 whatever the format.
//
// A row is read once: each thread keeps kPacks 16-byte packs of it in registers between the sums and the scaling. Rows
// that are too long for that, or do not lie on 16-byte boundaries, take the kernels `*_any`, which read a row two or
// three times: `size` numbers at an access, 16 bytes of them or one. The gradients of weight and bias have two stages,
// both in a fixed order: a block sums its kCudaRowsPerBlock rows, then one thread a column adds the sums of the blocks.
#pragma once

#include <type_traits>

#include "common/cuda.cuh"
#include "common/norm_cuda.h"

namespace ml {
namespace {

// Leaves 168 registers a thread: the packs of a row and of the gradients of weight and bias fit without spills.
constexpr int kMaxThreads = 384;

template <class T, class W>
struct ForwardArgs {
  const T *x, *residual;
  const W *weight, *bias;
  T *sum, *y;
  float *mean, *rstd;
  int64_t dim;
  float eps;
};

template <class T, class W>
struct BackwardArgs {
  const T *dy, *dsum, *input;
  const W* weight;
  const float *mean, *rstd;
  T* dx;
  float *weight_parts, *bias_parts;
  int64_t rows, dim;
};

// x + residual as it is stored.
template <class T>
__device__ __forceinline__ T add_stored(T x, T residual) {
  return from_float<T>(to_float(x) + to_float(residual));
}

// ceiling: 96 registers, 128 bytes of shared memory
template <class T, class W, int kPacks, bool kCentred, bool kAdds>
__global__ void __launch_bounds__(kMaxThreads) norm_forward_packed(ForwardArgs<T, W> args) {
  constexpr int kSize = kPackSize<T>;
  __shared__ float scratch[32];
  const int64_t row = blockIdx.x, dim = args.dim;
  const int num_packs = dim / kSize;
  const auto* x_row = reinterpret_cast<const Pack<T>*>(args.x + row * dim);
  const auto* weight_packs = reinterpret_cast<const Pack<W, kSize>*>(args.weight);
  const auto* bias_packs = reinterpret_cast<const Pack<W, kSize>*>(args.bias);
  auto* y_row = reinterpret_cast<Pack<T>*>(args.y + row * dim);
  Pack<T> held[kPacks];
  float total = 0.0f;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int pack = threadIdx.x + k * blockDim.x;
    if (pack >= num_packs) break;
    held[k] = x_row[pack];
    if constexpr (kAdds) {
      const auto residual = reinterpret_cast<const Pack<T>*>(args.residual + row * dim)[pack];
#pragma unroll
      for (int i = 0; i < kSize; ++i) held[k].values[i] = add_stored(held[k].values[i], residual.values[i]);
      reinterpret_cast<Pack<T>*>(args.sum + row * dim)[pack] = held[k];
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float v = to_float(held[k].values[i]);
      total += kCentred ? v : v * v;
    }
  }
  float mean = 0.0f, mean_square = block_sum(total, scratch) / dim;
  if constexpr (kCentred) {
    mean = mean_square;
    float squares = 0.0f;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (threadIdx.x + k * blockDim.x >= num_packs) break;
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float v = to_float(held[k].values[i]) - mean;
        squares += v * v;
      }
    }
    mean_square = block_sum(squares, scratch) / dim;
    if (threadIdx.x == 0) args.mean[row] = mean;
  }
  const float r = rsqrtf(mean_square + args.eps);
  if (threadIdx.x == 0) args.rstd[row] = r;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int pack = threadIdx.x + k * blockDim.x;
    if (pack >= num_packs) break;
    const auto w = weight_packs[pack];
    Pack<W, kSize> b;
    if constexpr (kCentred) b = bias_packs[pack];
    Pack<T> out;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      float y = (to_float(held[k].values[i]) - mean) * r * to_float(w.values[i]);
      if constexpr (kCentred) y += to_float(b.values[i]);
      out.values[i] = from_float<T>(y);
    }
    y_row[pack] = out;
  }
}

// ceiling: 168 registers, 128 bytes of shared memory
template <class T, class W, int kPacks, bool kCentred, bool kAdds>
__global__ void __launch_bounds__(kMaxThreads) norm_backward_packed(BackwardArgs<T, W> args) {
  constexpr int kSize = kPackSize<T>;
  __shared__ float scratch[32];
  const int64_t dim = args.dim;
  const int num_packs = dim / kSize;
  const int64_t begin = blockIdx.x * kCudaRowsPerBlock;
  const int64_t end = min(args.rows, begin + kCudaRowsPerBlock);
  const auto* weight_packs = reinterpret_cast<const Pack<W, kSize>*>(args.weight);
  Pack<float, kSize> dw[kPacks] = {}, db[kCentred ? kPacks : 1] = {};
  for (int64_t row = begin; row < end; ++row) {
    const auto* input_row = reinterpret_cast<const Pack<T>*>(args.input + row * dim);
    const auto* dy_row = reinterpret_cast<const Pack<T>*>(args.dy + row * dim);
    auto* dx_row = reinterpret_cast<Pack<T>*>(args.dx + row * dim);
    const float r = args.rstd[row], mean = kCentred ? args.mean[row] : 0.0f;
    Pack<T> held[kPacks], dy_held[kPacks];
    float sum_g = 0.0f, sum_gn = 0.0f;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int pack = threadIdx.x + k * blockDim.x;
      if (pack >= num_packs) break;
      held[k] = input_row[pack];
      dy_held[k] = dy_row[pack];
      const auto w = weight_packs[pack];
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float n = (to_float(held[k].values[i]) - mean) * r, up = to_float(dy_held[k].values[i]);
        const float g = up * to_float(w.values[i]);
        sum_gn += g * n;
        dw[k].values[i] += up * n;
        if constexpr (kCentred) {
          sum_g += g;
          db[k].values[i] += up;
        }
      }
    }
    const float mean_gn = block_sum(sum_gn, scratch) / dim;
    const float mean_g = kCentred ? block_sum(sum_g, scratch) / dim : 0.0f;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int pack = threadIdx.x + k * blockDim.x;
      if (pack >= num_packs) break;
      const auto w = weight_packs[pack];
      Pack<T> out, dsum;
      if constexpr (kAdds) dsum = reinterpret_cast<const Pack<T>*>(args.dsum + row * dim)[pack];
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float n = (to_float(held[k].values[i]) - mean) * r;
        const float g = to_float(dy_held[k].values[i]) * to_float(w.values[i]);
        float dx = (g - mean_g - n * mean_gn) * r;
        if constexpr (kAdds) dx += to_float(dsum.values[i]);
        out.values[i] = from_float<T>(dx);
      }
      dx_row[pack] = out;
    }
  }
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int pack = threadIdx.x + k * blockDim.x;
    if (pack >= num_packs) break;
    reinterpret_cast<Pack<float, kSize>*>(args.weight_parts + blockIdx.x * dim)[pack] = dw[k];
    if constexpr (kCentred) reinterpret_cast<Pack<float, kSize>*>(args.bias_parts + blockIdx.x * dim)[pack] = db[k];
  }
}

// `size` numbers that one access moves, or for numbers wider than T's that many 16-byte accesses.
template <class T, int size>
using Run = std::conditional_t<size == 1, Numbers<T, 1>, Pack<T, size>>;

template <int size, class T>
__device__ __forceinline__ Run<T, size> load(const T* source) {
  return *reinterpret_cast<const Run<T, size>*>(source);
}

template <int size, class T>
__device__ __forceinline__ void store(T* target, const Run<T, size>& run) {
  *reinterpret_cast<Run<T, size>*>(target) = run;
}

// ceiling: 64 registers, 128 bytes of shared memory
template <class T, class W, int size, bool kCentred, bool kAdds>
__global__ void __launch_bounds__(kMaxThreads) norm_forward_any(ForwardArgs<T, W> args) {
  __shared__ float scratch[32];
  const int64_t row = blockIdx.x, dim = args.dim, begin = int64_t(threadIdx.x) * size, step = blockDim.x * size;
  // Each thread comes back to the numbers that it wrote itself.
  const T* input = kAdds ? args.sum + row * dim : args.x + row * dim;
  float total = 0.0f;
  for (int64_t i = begin; i < dim; i += step) {
    auto held = load<size>(args.x + row * dim + i);
    if constexpr (kAdds) {
      const auto residual = load<size>(args.residual + row * dim + i);
#pragma unroll
      for (int j = 0; j < size; ++j) held.values[j] = add_stored(held.values[j], residual.values[j]);
      store<size>(args.sum + row * dim + i, held);
    }
#pragma unroll
    for (int j = 0; j < size; ++j) {
      const float v = to_float(held.values[j]);
      total += kCentred ? v : v * v;
    }
  }
  float mean = 0.0f, mean_square = block_sum(total, scratch) / dim;
  if constexpr (kCentred) {
    mean = mean_square;
    float squares = 0.0f;
    for (int64_t i = begin; i < dim; i += step) {
      const auto held = load<size>(input + i);
#pragma unroll
      for (int j = 0; j < size; ++j) {
        const float v = to_float(held.values[j]) - mean;
        squares += v * v;
      }
    }
    mean_square = block_sum(squares, scratch) / dim;
    if (threadIdx.x == 0) args.mean[row] = mean;
  }
  const float r = rsqrtf(mean_square + args.eps);
  if (threadIdx.x == 0) args.rstd[row] = r;
  for (int64_t i = begin; i < dim; i += step) {
    const auto held = load<size>(input + i);
    const auto w = load<size>(args.weight + i);
    Run<W, size> b;
    if constexpr (kCentred) b = load<size>(args.bias + i);
    Run<T, size> out;
#pragma unroll
    for (int j = 0; j < size; ++j) {
      float y = (to_float(held.values[j]) - mean) * r * to_float(w.values[j]);
      if constexpr (kCentred) y += to_float(b.values[j]);
      out.values[j] = from_float<T>(y);
    }
    store<size>(args.y + row * dim + i, out);
  }
}

// The sums for the gradients of weight and bias are in memory, so they are read and written once for so many rows.
constexpr int kRowsAtOnce = 4;

// ceiling: 80 registers, 128 bytes of shared memory
template <class T, class W, int size, bool kCentred, bool kAdds>
__global__ void __launch_bounds__(kMaxThreads) norm_backward_any(BackwardArgs<T, W> args) {
  __shared__ float scratch[32];
  const int64_t dim = args.dim, begin = int64_t(threadIdx.x) * size, step = blockDim.x * size;
  // A column belongs to one thread, which adds the rows in order.
  float* weight_part = args.weight_parts + blockIdx.x * dim;
  float* bias_part = kCentred ? args.bias_parts + blockIdx.x * dim : nullptr;
  const int64_t first_row = blockIdx.x * kCudaRowsPerBlock;
  const int64_t end_row = min(args.rows, first_row + kCudaRowsPerBlock);
  for (int64_t row = first_row; row < end_row; row += kRowsAtOnce) {
    const int num_rows = min(int64_t(kRowsAtOnce), end_row - row);
    const T *input = args.input + row * dim, *dy = args.dy + row * dim;
    float r[kRowsAtOnce], mean[kRowsAtOnce] = {}, mean_g[kRowsAtOnce] = {}, mean_gn[kRowsAtOnce] = {};
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
      if (k >= num_rows) break;
      r[k] = args.rstd[row + k];
      if constexpr (kCentred) mean[k] = args.mean[row + k];
    }
    for (int64_t i = begin; i < dim; i += step) {
      const auto w = load<size>(args.weight + i);
      Run<float, size> dw = {}, db = {};
      if (row > first_row) {
        dw = load<size>(weight_part + i);
        if constexpr (kCentred) db = load<size>(bias_part + i);
      }
#pragma unroll
      for (int k = 0; k < kRowsAtOnce; ++k) {
        if (k >= num_rows) break;
        const auto held = load<size>(input + k * dim + i), dy_held = load<size>(dy + k * dim + i);
#pragma unroll
        for (int j = 0; j < size; ++j) {
          const float n = (to_float(held.values[j]) - mean[k]) * r[k], up = to_float(dy_held.values[j]);
          const float g = up * to_float(w.values[j]);
          mean_gn[k] += g * n;
          dw.values[j] += up * n;
          if constexpr (kCentred) {
            mean_g[k] += g;
            db.values[j] += up;
          }
        }
      }
      store<size>(weight_part + i, dw);
      if constexpr (kCentred) store<size>(bias_part + i, db);
    }
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
      if (k >= num_rows) break;
      mean_gn[k] = block_sum(mean_gn[k], scratch) / dim;
      if constexpr (kCentred) mean_g[k] = block_sum(mean_g[k], scratch) / dim;
    }
    for (int64_t i = begin; i < dim; i += step) {
      const auto w = load<size>(args.weight + i);
#pragma unroll
      for (int k = 0; k < kRowsAtOnce; ++k) {
        if (k >= num_rows) break;
        const auto held = load<size>(input + k * dim + i), dy_held = load<size>(dy + k * dim + i);
        Run<T, size> out, dsum;
        if constexpr (kAdds) dsum = load<size>(args.dsum + (row + k) * dim + i);
#pragma unroll
        for (int j = 0; j < size; ++j) {
          const float n = (to_float(held.values[j]) - mean[k]) * r[k];
          const float g = to_float(dy_held.values[j]) * to_float(w.values[j]);
          float dx = (g - mean_g[k] - n * mean_gn[k]) * r[k];
          if constexpr (kAdds) dx += to_float(dsum.values[j]);
          out.values[j] = from_float<T>(dx);
        }
        store<size>(args.dx + (row + k) * dim + i, out);
      }
    }
  }
}

// ceiling: 48 registers, 0 bytes of shared memory
template <class W>
__global__ void norm_sum_parts(const float* __restrict__ parts, W* __restrict__ total, int64_t num_blocks,
                               int64_t dim) {
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= dim) return;
  double sum = 0.0;
  for (int64_t block = 0; block < num_blocks; ++block) sum += parts[block * dim + column];
  total[column] = from_float<W>(static_cast<float>(sum));
}

}  // namespace
}  // namespace ml
