// Cross-entropy over a shard of a vocabulary on CUDA; see cpu.cpp for the equations. Arithmetic is fp32 whatever the
// format. One block takes a row, and each kernel goes over it once.
//
// Thread t of n takes the packs t, t + n, ... of a row, wherever the row starts in memory: so its results do not depend
// on which chunk of tokens it is in. Rows that all start on 16-byte boundaries are read and written by 16-byte
// accesses, others number by number.

#include "common/cuda.cuh"
#include "cross_entropy/cuda.h"

namespace ml {
namespace {

constexpr int kMaxThreads = 512;
// As a maximum of nothing: below every logit, and its differences are no NaN.
constexpr float kLowest = -3.40282347e38f;

__device__ __forceinline__ float exp_of(float x) { return exp2f(x * 1.44269504f); }

// Numbers `first` and on of a row, of which `count` are there; the rest become `behind`.
template <class T, bool kAligned>
__device__ __forceinline__ Pack<T> load_pack(const T* row, int64_t first, int64_t count, T behind) {
  constexpr int kSize = kPackSize<T>;
  if (kAligned && first + kSize <= count) return *reinterpret_cast<const Pack<T>*>(row + first);
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < kSize; ++i) pack.values[i] = first + i < count ? row[first + i] : behind;
  return pack;
}

template <class T, bool kAligned>
__device__ __forceinline__ void store_pack(T* row, int64_t first, int64_t count, const Pack<T>& pack) {
  constexpr int kSize = kPackSize<T>;
  if (kAligned && first + kSize <= count) {
    *reinterpret_cast<Pack<T>*>(row + first) = pack;
    return;
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i)
    if (first + i < count) row[first + i] = pack.values[i];
}

// The maximum of `v` over the block, in every thread. `scratch` holds 32 floats of shared memory.
__device__ __forceinline__ float block_max(float v, float* scratch) {
  const int warp = threadIdx.x / 32, num_warps = (blockDim.x + 31) / 32;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, offset));
  __syncthreads();  // the previous call's readers are done with scratch
  if (threadIdx.x % 32 == 0) scratch[warp] = v;
  __syncthreads();
  float highest = scratch[0];
  for (int i = 1; i < num_warps; ++i) highest = fmaxf(highest, scratch[i]);
  return highest;
}

// ceiling: 40 registers, 128 bytes of shared memory
template <class T, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads)
    statistics_of_row(const T* __restrict__ logits, CrossEntropyShard shard, CrossEntropyStatistics statistics) {
  constexpr int kSize = kPackSize<T>;
  __shared__ float scratch[32];
  const int64_t row = blockIdx.x, target = shard.targets[row];
  const bool is_ignored = target == shard.ignored;
  const int64_t size = is_ignored ? 0 : shard.size;
  const T* x = logits + row * shard.stride;
  float maximum = kLowest, sum = 0.0f, total = 0.0f;
  for (int64_t first = threadIdx.x * kSize; first < size; first += blockDim.x * kSize) {
    const Pack<T> pack = load_pack<T, kAligned>(x, first, size, from_float<T>(-INFINITY));
    float values[kSize], highest = maximum;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      values[i] = to_float(pack.values[i]);
      highest = fmaxf(highest, values[i]);
    }
    sum *= exp_of(maximum - highest);
    maximum = highest;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      sum += exp_of(values[i] - maximum);
      total += first + i < size ? values[i] : 0.0f;
    }
  }
  const float highest = block_max(maximum, scratch);
  sum = block_sum(sum * exp_of(maximum - highest), scratch);
  total = block_sum(total, scratch);
  if (threadIdx.x == 0) {
    const int64_t column = target - shard.start;
    const bool is_here = column >= 0 && column < size;
    statistics.maxima[row] = is_ignored ? 0.0f : highest;
    statistics.sums[row] = is_ignored ? 1.0f : sum;
    statistics.picked[row] = is_ignored ? 0.0f : is_here ? to_float(x[column]) : -INFINITY;
    statistics.totals[row] = total;
  }
}

// `gradient` may be `logits`: a thread writes the numbers that it has read, and nobody reads them after.
// ceiling: 56 registers, 0 bytes of shared memory
template <class T, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads)
    gradient_of_row(const T* logits, CrossEntropyShard shard, CrossEntropySlope slope, T* gradient) {
  constexpr int kSize = kPackSize<T>;
  const int64_t row = blockIdx.x, target = shard.targets[row];
  const bool is_ignored = target == shard.ignored;
  const int64_t size = is_ignored ? 0 : shard.size, column = target - shard.start;
  const T* x = logits + row * shard.stride;
  T* out = gradient + row * shard.stride;
  const float maximum = slope.maxima[row], sum = slope.sums[row], g = slope.upstream[row];
  const float z_slope = 2.0f * slope.z_loss * (maximum + logf(sum));
  const float factor = g * (1.0f + z_slope) / sum, base = g * slope.uniform;
  // The thread that goes over the target's column reads it first and writes it last: near 1 - 1, with the z-loss apart.
  const bool has_target = column >= 0 && column < size && (column / kSize) % blockDim.x == threadIdx.x;
  const float p = has_target ? exp_of(to_float(x[column]) - maximum) / sum : 0.0f;
  const float at_target = g * ((p - (1.0f - slope.label_smoothing)) + p * z_slope) - base;
  for (int64_t first = threadIdx.x * kSize; first < shard.stride; first += blockDim.x * kSize) {
    Pack<T> pack = load_pack<T, kAligned>(x, first, size, from_float<T>(0.0f));
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float value = exp_of(to_float(pack.values[i]) - maximum) * factor - base;
      pack.values[i] = from_float<T>(first + i < size ? value : 0.0f);
    }
    store_pack<T, kAligned>(out, first, shard.stride, pack);
  }
  if (has_target) out[column] = from_float<T>(at_target);
}

// ---- launchers

// Threads of a row: four packs or more each, so that a thread has work beside the sums over the block.
template <class T>
unsigned threads_of(int64_t stride) {
  const int64_t threads = (stride / (4 * kPackSize<T>) + 31) / 32 * 32;
  return static_cast<unsigned>(threads < 32 ? 32 : threads > kMaxThreads ? kMaxThreads : threads);
}

template <class T>
bool rows_on_16_bytes(int64_t stride, const void* logits, const void* gradient) {
  return on_16_bytes(logits, gradient) && stride % kPackSize<T> == 0;
}

// What `launch` returns for the format as a type.
template <class Launch>
int with_type(Format format, Launch launch) {
  switch (format) {
    case Format::kFp32: return launch(float{});
    case Format::kBf16: return launch(__nv_bfloat16{});
    case Format::kFp16: return launch(__half{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int cross_entropy_statistics_cuda(const CrossEntropyShard& shard, const void* logits,
                                  const CrossEntropyStatistics& statistics, int64_t rows, void* stream) {
  if (rows == 0) return cudaSuccess;
  return with_type(shard.format, [&](auto type) -> int {
    using T = decltype(type);
    const bool is_aligned = rows_on_16_bytes<T>(shard.stride, logits, logits);
    const auto kernel = is_aligned ? statistics_of_row<T, true> : statistics_of_row<T, false>;
    return launch(kernel, rows, threads_of<T>(shard.stride), 0,
                  static_cast<cudaStream_t>(stream), static_cast<const T*>(logits), shard, statistics);
  });
}

int cross_entropy_gradient_cuda(const CrossEntropyShard& shard, const void* logits, const CrossEntropySlope& slope,
                                void* gradient, int64_t rows, void* stream) {
  if (rows == 0 || shard.stride == 0) return cudaSuccess;
  return with_type(shard.format, [&](auto type) -> int {
    using T = decltype(type);
    const bool is_aligned = rows_on_16_bytes<T>(shard.stride, logits, gradient);
    const auto kernel = is_aligned ? gradient_of_row<T, true> : gradient_of_row<T, false>;
    return launch(kernel, rows, threads_of<T>(shard.stride), 0,
                  static_cast<cudaStream_t>(stream), static_cast<const T*>(logits), shard, slope,
                  static_cast<T*>(gradient));
  });
}

}  // namespace ml
