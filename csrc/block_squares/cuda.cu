// Sums of squares over blocks of 256 numbers on CUDA, in fp64, with the bits of cpu.cpp: the same tree of additions. A
// square is exact, so it does not matter where the compiler fuses it with an addition.

#include "block_squares/cuda.h"
#include "common/cuda.cuh"

namespace ml {
namespace {

constexpr int kValues = 256, kThreads = 256;  // values of a block; one warp sums a block

template <class T>
struct alignas(sizeof(T) * 4) Four {
  T values[4];
};

template <class T>
__device__ __forceinline__ Four<T> load_four(const T* source, bool is_packed) {
  if (is_packed) return *reinterpret_cast<const Four<T>*>(source);
  return {source[0], source[1], source[2], source[3]};
}

__device__ __forceinline__ double square(double x) { return x * x; }

__device__ __forceinline__ double add_across(double value, int lanes) {
  return value + __shfl_xor_sync(0xffffffffu, value, lanes);
}

// Lane l holds values 4 l .. 4 l + 3 and their partners 128 further on. Values 64 and 32 further on lie with the lanes
// 16 and 8 further on: these two exchange halves, so that each adds only what it keeps. In the end a lane holds one of
// the four columns, and adding these (first those two apart) is again an exchange with the lanes 16 and 8 further on.
// ceiling: 40 registers, 0 bytes of shared memory
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_blocks(const T* __restrict__ values, double* __restrict__ sums, int64_t blocks, bool is_packed) {
  const int lane = threadIdx.x % 32;
  const int64_t block = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (block >= blocks) return;  // the whole warp
  const T* source = values + block * kValues + 4 * lane;
  const Four<T> low = load_four(source, is_packed), high = load_four(source + kValues / 2, is_packed);
  double part[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) part[i] = square(to_float(low.values[i])) + square(to_float(high.values[i]));
  const bool keeps_upper = lane & 16, keeps_odd = lane & 8;
  double pair[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const double sent = keeps_upper ? part[i] : part[i + 2], kept = keeps_upper ? part[i + 2] : part[i];
    pair[i] = kept + __shfl_xor_sync(0xffffffffu, sent, 16);
  }
  const double sent = keeps_odd ? pair[0] : pair[1], kept = keeps_odd ? pair[1] : pair[0];
  double sum = kept + __shfl_xor_sync(0xffffffffu, sent, 8);
  sum = add_across(sum, 4);
  sum = add_across(sum, 2);
  sum = add_across(sum, 1);
  sum = add_across(sum, 16);
  sum = add_across(sum, 8);
  if (lane == 0) sums[block] = sum;
}

template <class T>
int launch_sum(const void* values_, double* sums, int64_t blocks, cudaStream_t stream) {
  const auto* values = static_cast<const T*>(values_);
  const bool is_packed = reinterpret_cast<uintptr_t>(values) % sizeof(Four<T>) == 0;
  constexpr int kPerBlock = kThreads / 32;
  return launch(sum_blocks<T>, (blocks + kPerBlock - 1) / kPerBlock, kThreads, 0, stream, values, sums, blocks,
                is_packed);
}

}  // namespace

int block_squares_cuda(Format format, const void* values, double* sums, int64_t blocks, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  if (blocks == 0) return cudaSuccess;
  switch (format) {
    case Format::kFp32: return launch_sum<float>(values, sums, blocks, stream);
    case Format::kBf16: return launch_sum<__nv_bfloat16>(values, sums, blocks, stream);
    case Format::kFp16: return launch_sum<__half>(values, sums, blocks, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace ml
