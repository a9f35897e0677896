// What the CUDA kernels share: launches, 16-byte accesses, conversions to and from fp32, sums over a warp and over a
// row's threads.
//
// The tests compile every .cu file for the CPU too (ML_EMULATED), where threads take turns between barriers.
#pragma once

#ifdef ML_EMULATED
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace ml {

#ifndef ML_EMULATED
// `launch`, on a grid that may be one.
template <class... Parameters, class... Arguments>
cudaError_t start(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                  Arguments... arguments) {
  if (shared_bytes > 48 * 1024) {
    const auto code = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (code != cudaSuccess) return code;
  }
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  return cudaGetLastError();
}

// The block's dynamic shared memory.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char ml_dynamic_shared[];
  return reinterpret_cast<T*>(ml_dynamic_shared);
}
#endif

// Numbers of blocks, in 64 bits: more than a grid takes must not become, in 32, a number that it does take.
struct Grid {
  int64_t x, y;
  Grid(int64_t x, int64_t y = 1) : x(x), y(y) {}
};

// Starts `kernel` on `grid` blocks of `block` threads with `shared_bytes` of dynamic shared memory.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), Grid grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
  if (grid.x > INT32_MAX || grid.y > 65535) return cudaErrorInvalidConfiguration;
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  return start(kernel, blocks, block, shared_bytes, stream, arguments...);
}

// As many numbers as one 16-byte access moves.
template <class T>
constexpr int kPackSize = 16 / sizeof(T);

// `size` numbers that start on a 16-byte boundary, so that copying them takes 16-byte accesses.
template <class T, int size = kPackSize<T>>
struct alignas(16) Pack {
  T values[size];
};

// `size` numbers that one access moves.
template <class T, int size>
struct alignas(size * sizeof(T)) Numbers {
  T values[size];
};

template <class... Pointers>
bool on_16_bytes(Pointers... pointers) {
  return (reinterpret_cast<uintptr_t>(pointers) | ...) % 16 == 0;
}

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) { return v; }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }
template <>
__device__ __forceinline__ __half from_float<__half>(float v) { return __float2half_rn(v); }

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// The sum of `v` over the block, in every thread. `scratch` holds 32 floats of shared memory. Every thread adds the
// same warp sums in the same order, so all get the same bits.
__device__ __forceinline__ float block_sum(float v, float* scratch) {
  const int warp = threadIdx.x / 32, num_warps = (blockDim.x + 31) / 32;
  v = warp_sum(v);
  if (num_warps == 1) return v;
  __syncthreads();  // the previous call's readers are done with scratch
  if (threadIdx.x % 32 == 0) scratch[warp] = v;
  __syncthreads();
  float total = 0.0f;
  for (int i = 0; i < num_warps; ++i) total += scratch[i];
  return total;
}

}  // namespace ml
