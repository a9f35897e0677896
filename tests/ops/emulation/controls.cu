// Kernels that are wrong in the ways that the emulation has to notice, and right ones beside them. See
// test_emulation.py, which calls the functions at the end: each takes in[64] and out[64] and returns a CUDA error code.

#include "common/cuda.cuh"

namespace {

template <bool kHasBarrier>
__global__ void sum_of_block(const float* in, float* out) {
  __shared__ float held[64];
  held[threadIdx.x] = in[threadIdx.x];
  if (kHasBarrier) __syncthreads();
  float sum = 0.0f;
  for (int i = 0; i < 64; ++i) sum += held[i];
  out[threadIdx.x] = sum;
}

// The second round may overwrite what a slow thread of the first has yet to read, unless a barrier stands between.
template <bool kHasBarrier>
__global__ void two_rounds(const float* in, float* out) {
  __shared__ float held;
  float sum = 0.0f;
  for (int round = 0; round < 2; ++round) {
    if (threadIdx.x == 0) held = in[round];
    __syncthreads();
    sum += held;
    if (kHasBarrier) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

__global__ void one_returns_early(const float* in, float* out) {
  if (threadIdx.x == 3) return;
  __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void two_barriers(const float* in, float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void one_lane_is_missing(const float* in, float* out) {
  if (threadIdx.x != 5) out[threadIdx.x] = ml::warp_sum(in[threadIdx.x]);
}

__global__ void writes_behind(const float* in, float* out) {
  ml::dynamic_shared<float>()[threadIdx.x + 1] = in[threadIdx.x];
  out[threadIdx.x] = 0.0f;
}

__global__ void shuffles(const float* in, float* out) {
  const float v = in[threadIdx.x];
  float sum = __shfl_xor_sync(0xffffffffu, v, 5) + 2 * __shfl_down_sync(0xffffffffu, v, 3);
  sum += 4 * __shfl_up_sync(0xffffffffu, v, 2) + 8 * __shfl_sync(0xffffffffu, v, 7, 16);
  out[threadIdx.x] = sum + (__any_sync(0xffffffffu, v == in[0]) ? 1000.0f : 0.0f) +
                     ml::block_sum(v, ml::dynamic_shared<float>());
}

int run(void (*kernel)(const float*, float*), const float* in, float* out, size_t shared_bytes = 256) {
  return ml::launch(kernel, 1, 64, shared_bytes, nullptr, in, out);
}

}  // namespace

#define ML_CONTROL(name, ...)                                                             \
  extern "C" __attribute__((visibility("default"))) int name(const float* in, float* out) { \
    return run(__VA_ARGS__, in, out);                                                     \
  }

ML_CONTROL(control_sum, sum_of_block<true>)
ML_CONTROL(control_sum_without_barrier, sum_of_block<false>)
ML_CONTROL(control_rounds, two_rounds<true>)
ML_CONTROL(control_rounds_without_barrier, two_rounds<false>)
ML_CONTROL(control_early_return, one_returns_early)
ML_CONTROL(control_two_barriers, two_barriers)
ML_CONTROL(control_missing_lane, one_lane_is_missing)
ML_CONTROL(control_writes_behind, writes_behind)
ML_CONTROL(control_shuffles, shuffles)

extern "C" __attribute__((visibility("default"))) int control_too_much_shared_memory(const float* in, float* out) {
  return run(shuffles, in, out, 200 * 1024);
}
