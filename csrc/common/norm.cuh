// RMSNorm and LayerNorm on CUDA, with and without an addition before them: what the kernels of rms_norm/cuda.cu and
// layer_norm/cuda.cu do, and how they are launched. See norm_rows.h for the equations; kCentred is LayerNorm.
// Arithmetic is fp32 whatever the format.
//
// A row is read once: each thread keeps kPacks 16-byte packs of it in registers between the sums and the scaling. Rows
// that are too long for that, or do not lie on 16-byte boundaries, take the functions `*_any`, which read a row two or
// three times. The gradients of weight and bias have two stages, both in a fixed order: a thread block sums its
// kCudaRowsPerBlock rows, then one thread a column adds the blocks' sums.
#pragma once

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

template <class T, class W, int kPacks, bool kCentred, bool kAdds>
__device__ __forceinline__ void norm_forward_packed(const ForwardArgs<T, W>& args) {
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

template <class T, class W, int kPacks, bool kCentred, bool kAdds>
__device__ __forceinline__ void norm_backward_packed(const BackwardArgs<T, W>& args) {
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

template <class T, class W, bool kCentred, bool kAdds>
__device__ __forceinline__ void norm_forward_any(const ForwardArgs<T, W>& args) {
  __shared__ float scratch[32];
  const int64_t row = blockIdx.x, dim = args.dim;
  // Each thread comes back to the numbers that it wrote itself.
  const T* input = kAdds ? args.sum + row * dim : args.x + row * dim;
  float total = 0.0f;
  for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) {
    if constexpr (kAdds) args.sum[row * dim + i] = add_stored(args.x[row * dim + i], args.residual[row * dim + i]);
    const float v = to_float(input[i]);
    total += kCentred ? v : v * v;
  }
  float mean = 0.0f, mean_square = block_sum(total, scratch) / dim;
  if constexpr (kCentred) {
    mean = mean_square;
    float squares = 0.0f;
    for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) {
      const float v = to_float(input[i]) - mean;
      squares += v * v;
    }
    mean_square = block_sum(squares, scratch) / dim;
    if (threadIdx.x == 0) args.mean[row] = mean;
  }
  const float r = rsqrtf(mean_square + args.eps);
  if (threadIdx.x == 0) args.rstd[row] = r;
  for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) {
    float y = (to_float(input[i]) - mean) * r * to_float(args.weight[i]);
    if constexpr (kCentred) y += to_float(args.bias[i]);
    args.y[row * dim + i] = from_float<T>(y);
  }
}

template <class T, class W, bool kCentred, bool kAdds>
__device__ __forceinline__ void norm_backward_any(const BackwardArgs<T, W>& args) {
  __shared__ float scratch[32];
  const int64_t dim = args.dim;
  // Column i belongs to one thread, which adds the rows in order.
  float* weight_part = args.weight_parts + blockIdx.x * dim;
  float* bias_part = kCentred ? args.bias_parts + blockIdx.x * dim : nullptr;
  for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) {
    weight_part[i] = 0.0f;
    if constexpr (kCentred) bias_part[i] = 0.0f;
  }
  const int64_t begin = blockIdx.x * kCudaRowsPerBlock;
  const int64_t end = min(args.rows, begin + kCudaRowsPerBlock);
  for (int64_t row = begin; row < end; ++row) {
    const T *input = args.input + row * dim, *dy = args.dy + row * dim;
    const float r = args.rstd[row], mean = kCentred ? args.mean[row] : 0.0f;
    float sum_g = 0.0f, sum_gn = 0.0f;
    for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) {
      const float g = to_float(dy[i]) * to_float(args.weight[i]);
      sum_gn += g * ((to_float(input[i]) - mean) * r);
      if constexpr (kCentred) sum_g += g;
    }
    const float mean_gn = block_sum(sum_gn, scratch) / dim;
    const float mean_g = kCentred ? block_sum(sum_g, scratch) / dim : 0.0f;
    for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) {
      const float n = (to_float(input[i]) - mean) * r, up = to_float(dy[i]);
      weight_part[i] += up * n;
      if constexpr (kCentred) bias_part[i] += up;
      float dx = (up * to_float(args.weight[i]) - mean_g - n * mean_gn) * r;
      if constexpr (kAdds) dx += to_float(args.dsum[row * dim + i]);
      args.dx[row * dim + i] = from_float<T>(dx);
    }
  }
}

template <class W>
__device__ __forceinline__ void norm_sum_parts(const float* __restrict__ parts, W* __restrict__ total,
                                               int64_t num_blocks, int64_t dim) {
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= dim) return;
  double sum = 0.0;
  for (int64_t block = 0; block < num_blocks; ++block) sum += parts[block * dim + column];
  total[column] = from_float<W>(static_cast<float>(sum));
}

// ---- launchers. `Kernels` gives the kernels of an op by their template arguments.

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

template <class Kernels, class T, class W, bool kAdds>
int launch_forward(const NormForwardCuda& in, cudaStream_t stream) {
  const ForwardArgs<T, W> args{static_cast<const T*>(in.x),
                               static_cast<const T*>(in.residual),
                               static_cast<const W*>(in.weight),
                               static_cast<const W*>(in.bias),
                               static_cast<T*>(in.sum),
                               static_cast<T*>(in.y),
                               in.mean,
                               in.rstd,
                               in.dim,
                               in.eps};
  const Spread spread =
      spread_of<T>(in.dim, on_16_bytes(args.x, args.residual, args.weight, args.bias, args.sum, args.y));
  const auto grid = static_cast<unsigned>(in.rows);
  const int threads = spread.threads;
  switch (spread.packs) {
    case 1: return launch(Kernels::template forward<T, W, 1, kAdds>(), grid, threads, 0, stream, args);
    case 2: return launch(Kernels::template forward<T, W, 2, kAdds>(), grid, threads, 0, stream, args);
    case 4: return launch(Kernels::template forward<T, W, 4, kAdds>(), grid, threads, 0, stream, args);
    default: return launch(Kernels::template forward<T, W, 0, kAdds>(), grid, threads, 0, stream, args);
  }
}

template <class Kernels, class T, class W, bool kAdds>
int launch_backward(const NormBackwardCuda& in, cudaStream_t stream) {
  const BackwardArgs<T, W> args{static_cast<const T*>(in.dy),
                                static_cast<const T*>(in.dsum),
                                static_cast<const T*>(in.input),
                                static_cast<const W*>(in.weight),
                                in.mean,
                                in.rstd,
                                static_cast<T*>(in.dx),
                                in.weight_parts,
                                in.bias_parts,
                                in.rows,
                                in.dim};
  const Spread spread = spread_of<T>(
      in.dim, on_16_bytes(args.dy, args.dsum, args.input, args.weight, args.dx, in.weight_parts, in.bias_parts));
  const int64_t num_blocks = (in.rows + kCudaRowsPerBlock - 1) / kCudaRowsPerBlock;
  const auto grid = static_cast<unsigned>(num_blocks);
  const int threads = spread.threads;
  int code = cudaSuccess;
  switch (num_blocks > 0 ? spread.packs : -1) {
    case -1: break;  // no rows: the gradients of weight and bias are zero, and a grid of no blocks is an error
    case 1: code = launch(Kernels::template backward<T, W, 1, kAdds>(), grid, threads, 0, stream, args); break;
    case 2: code = launch(Kernels::template backward<T, W, 2, kAdds>(), grid, threads, 0, stream, args); break;
    case 4: code = launch(Kernels::template backward<T, W, 4, kAdds>(), grid, threads, 0, stream, args); break;
    default: code = launch(Kernels::template backward<T, W, 0, kAdds>(), grid, threads, 0, stream, args);
  }
  const auto columns = static_cast<unsigned>((in.dim + 127) / 128);
  const auto sum = [&](const float* parts, void* total) -> int {
    return launch(Kernels::template sum<W>(), columns, 128, 0, stream, parts, static_cast<W*>(total), num_blocks,
                  in.dim);
  };
  if (code == cudaSuccess) code = sum(in.weight_parts, in.dweight);
  if (code == cudaSuccess && in.dbias != nullptr) code = sum(in.bias_parts, in.dbias);
  return code;
}

// What `call` returns for the two formats as types. The weight is of x's format, or fp32.
template <class Call>
int with_types(Format format, Format weight_format, Call call) {
  if (format != weight_format && weight_format != Format::kFp32) return cudaErrorInvalidValue;
  const bool wide_weight = weight_format == Format::kFp32;
  switch (format) {
    case Format::kFp32: return call(float{}, float{});
    case Format::kBf16: return wide_weight ? call(__nv_bfloat16{}, float{}) : call(__nv_bfloat16{}, __nv_bfloat16{});
    case Format::kFp16: return wide_weight ? call(__half{}, float{}) : call(__half{}, __half{});
  }
  return cudaErrorInvalidValue;
}

template <class Kernels>
int norm_forward(Format format, Format weight_format, const NormForwardCuda& in, void* stream_) {
  if (in.rows == 0) return cudaSuccess;
  const auto stream = static_cast<cudaStream_t>(stream_);
  return with_types(format, weight_format, [&](auto t, auto w) {
    return in.residual != nullptr ? launch_forward<Kernels, decltype(t), decltype(w), true>(in, stream)
                                  : launch_forward<Kernels, decltype(t), decltype(w), false>(in, stream);
  });
}

template <class Kernels>
int norm_backward(Format format, Format weight_format, const NormBackwardCuda& in, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  return with_types(format, weight_format, [&](auto t, auto w) {
    return in.dsum != nullptr ? launch_backward<Kernels, decltype(t), decltype(w), true>(in, stream)
                              : launch_backward<Kernels, decltype(t), decltype(w), false>(in, stream);
  });
}

}  // namespace
}  // namespace ml
