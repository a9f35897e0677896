// AdamW on CUDA in one pass over memory; update.h has the equations. The rounding of each operation is asked for by
// name, so that none is fused with another and the bits are those of the CPU.

#include <type_traits>

#include "adamw/cuda.h"
#include "common/cuda.cuh"

namespace ml {
namespace {

constexpr int kThreads = 256;
constexpr int kSize = 4;   // elements of one 16-byte access to fp32
constexpr int kPacks = 2;  // in a thread's hands at once, so that enough loads are under way

// Stands for the format of parameters that are not written.
struct None {};

__device__ __forceinline__ float subtract(float a, float b) { return __fadd_rn(a, -b); }

__device__ __forceinline__ void update_element(float gradient, float& first, float& second, float& weight,
                                               const AdamWCoefficients& c, float decay) {
  const float g = __fmul_rn(gradient, c.factor);
  first = __fadd_rn(c.mean_weight > 0.0f ? first : g, __fmul_rn(c.mean_weight, subtract(g, first)));
  second = __fadd_rn(__fmul_rn(c.square_keep, second), __fmul_rn(c.square_weight, __fmul_rn(g, g)));
  weight = subtract(weight, __fmul_rn(decay, weight));
  weight = subtract(weight, __fdiv_rn(__fmul_rn(c.step_size, first), __fadd_rn(__fsqrt_rn(second), c.eps)));
}

template <class T>
struct alignas(sizeof(T) * kSize) Four {
  T values[kSize];
};

// ceiling: 64 registers, 0 bytes of shared memory
template <class G, class P>
__global__ void __launch_bounds__(kThreads)
    update_packed(const G* __restrict__ gradients_, float* __restrict__ first_, float* __restrict__ second_,
                  float* __restrict__ weights_, P* __restrict__ parameters_, AdamWCoefficients coefficients,
                  float decay, int64_t num_packs) {
  const auto* gradients = reinterpret_cast<const Four<G>*>(gradients_);
  auto* first = reinterpret_cast<Four<float>*>(first_);
  auto* second = reinterpret_cast<Four<float>*>(second_);
  auto* weights = reinterpret_cast<Four<float>*>(weights_);
  const int64_t begin = int64_t(blockIdx.x) * (kThreads * kPacks) + threadIdx.x;
  Four<G> g[kPacks];
  Four<float> m[kPacks], v[kPacks], w[kPacks];
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int64_t pack = begin + k * kThreads;
    if (pack >= num_packs) break;
    g[k] = gradients[pack];
    m[k] = first[pack];
    v[k] = second[pack];
    w[k] = weights[pack];
  }
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int64_t pack = begin + k * kThreads;
    if (pack >= num_packs) break;
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      update_element(to_float(g[k].values[i]), m[k].values[i], v[k].values[i], w[k].values[i], coefficients, decay);
    first[pack] = m[k];
    second[pack] = v[k];
    weights[pack] = w[k];
    if constexpr (!std::is_same_v<P, None>) {
      Four<P> rounded;
#pragma unroll
      for (int i = 0; i < kSize; ++i) rounded.values[i] = from_float<P>(w[k].values[i]);
      reinterpret_cast<Four<P>*>(parameters_)[pack] = rounded;
    }
  }
}

// For memory that does not lie on the boundaries of whole packs, and for what is left of it behind the last pack.
// ceiling: 32 registers, 0 bytes of shared memory
template <class G, class P>
__global__ void __launch_bounds__(kThreads)
    update_any(const G* __restrict__ gradients, float* __restrict__ first, float* __restrict__ second,
               float* __restrict__ weights, P* __restrict__ parameters, AdamWCoefficients coefficients, float decay,
               int64_t begin, int64_t end) {
  const int64_t i = begin + int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= end) return;
  float m = first[i], v = second[i], w = weights[i];
  update_element(to_float(gradients[i]), m, v, w, coefficients, decay);
  first[i] = m;
  second[i] = v;
  weights[i] = w;
  if constexpr (!std::is_same_v<P, None>) parameters[i] = from_float<P>(w);
}

int64_t blocks_for(int64_t count, int64_t each) { return (count + each - 1) / each; }

template <class T>
bool on_pack(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(Four<T>) == 0;
}

template <class G, class P>
int launch_update(const AdamWMemory& memory, const AdamWCoefficients& coefficients, float decay, int64_t begin,
                  int64_t end, cudaStream_t stream) {
  const auto* gradients = static_cast<const G*>(memory.gradients) + begin;
  float *first = memory.first + begin, *second = memory.second + begin, *weights = memory.weights + begin;
  P* parameters = nullptr;
  bool is_packed = on_pack(gradients) && on_16_bytes(first, second, weights);
  if constexpr (!std::is_same_v<P, None>) {
    parameters = static_cast<P*>(memory.parameters) + begin;
    is_packed = is_packed && on_pack(parameters);
  }
  const int64_t size = end - begin, num_packs = is_packed ? size / kSize : 0;
  if (num_packs > 0) {
    const int code = launch(update_packed<G, P>, blocks_for(num_packs, kThreads * kPacks), kThreads, 0, stream,
                            gradients, first, second, weights, parameters, coefficients, decay, num_packs);
    if (code != cudaSuccess) return code;
  }
  const int64_t done = num_packs * kSize;
  if (done == size) return cudaSuccess;
  return launch(update_any<G, P>, blocks_for(size - done, kThreads), kThreads, 0, stream, gradients, first, second,
                weights, parameters, coefficients, decay, done, size);
}

template <class G>
int with_parameters(const AdamWMemory& memory, const AdamWCoefficients& coefficients, float decay, int64_t begin,
                    int64_t end, cudaStream_t stream) {
  if (memory.parameters == nullptr) return launch_update<G, None>(memory, coefficients, decay, begin, end, stream);
  switch (memory.parameter_format) {
    case Format::kFp32: return launch_update<G, float>(memory, coefficients, decay, begin, end, stream);
    case Format::kBf16: return launch_update<G, __nv_bfloat16>(memory, coefficients, decay, begin, end, stream);
    case Format::kFp16: return launch_update<G, __half>(memory, coefficients, decay, begin, end, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int adamw_cuda(const AdamWMemory& memory, const AdamWCoefficients& coefficients, float decay, int64_t begin,
               int64_t end, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  if (begin >= end) return cudaSuccess;
  switch (memory.gradient_format) {
    case Format::kFp32: return with_parameters<float>(memory, coefficients, decay, begin, end, stream);
    case Format::kBf16: return with_parameters<__nv_bfloat16>(memory, coefficients, decay, begin, end, stream);
    case Format::kFp16: return with_parameters<__half>(memory, coefficients, decay, begin, end, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace ml
