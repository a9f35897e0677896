// GELU on CUDA, forward and backward, element by element in fp32: y = a(x), d_x = d a'(x).
//
// A thread takes as many numbers as a 16-byte access moves, or one where the tensors do not lie on such boundaries.

#include "common/activation.cuh"
#include "common/cuda.cuh"
#include "gelu/cuda.h"

namespace ml {
namespace {

constexpr int kThreads = 256;

// ceiling: 48 registers, 0 bytes of shared memory
template <class T, int size, Activation activation>
__global__ void __launch_bounds__(kThreads) gelu_forward(const T* __restrict__ x, T* __restrict__ out, int64_t count) {
  using Run = Numbers<T, size>;
  const int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * size;
  if (first >= count) return;
  const Run held = *reinterpret_cast<const Run*>(x + first);
  Run result;
#pragma unroll
  for (int i = 0; i < size; ++i)
    result.values[i] = from_float<T>(value_and_slope<activation>(to_float(held.values[i])).value);
  *reinterpret_cast<Run*>(out + first) = result;
}

// ceiling: 48 registers, 0 bytes of shared memory
template <class T, int size, Activation activation>
__global__ void __launch_bounds__(kThreads)
    gelu_backward(const T* __restrict__ d_out, const T* __restrict__ x, T* __restrict__ d_x, int64_t count) {
  using Run = Numbers<T, size>;
  const int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * size;
  if (first >= count) return;
  const Run d = *reinterpret_cast<const Run*>(d_out + first), held = *reinterpret_cast<const Run*>(x + first);
  Run result;
#pragma unroll
  for (int i = 0; i < size; ++i) {
    const float slope = value_and_slope<activation>(to_float(held.values[i])).slope;
    result.values[i] = from_float<T>(to_float(d.values[i]) * slope);
  }
  *reinterpret_cast<Run*>(d_x + first) = result;
}

int64_t grid_of(int64_t runs) { return (runs + kThreads - 1) / kThreads; }

template <class T, Activation activation>
int launch_forward(const void* x_, void* out_, int64_t count, cudaStream_t stream) {
  constexpr int kSize = kPackSize<T>;
  const auto* x = static_cast<const T*>(x_);
  auto* out = static_cast<T*>(out_);
  if (count % kSize == 0 && on_16_bytes(x, out))
    return launch(gelu_forward<T, kSize, activation>, grid_of(count / kSize), kThreads, 0, stream, x, out, count);
  return launch(gelu_forward<T, 1, activation>, grid_of(count), kThreads, 0, stream, x, out, count);
}

template <class T, Activation activation>
int launch_backward(const void* d_out_, const void* x_, void* d_x_, int64_t count, cudaStream_t stream) {
  constexpr int kSize = kPackSize<T>;
  const auto *d_out = static_cast<const T*>(d_out_), *x = static_cast<const T*>(x_);
  auto* d_x = static_cast<T*>(d_x_);
  if (count % kSize == 0 && on_16_bytes(d_out, x, d_x))
    return launch(gelu_backward<T, kSize, activation>, grid_of(count / kSize), kThreads, 0, stream, d_out, x, d_x,
                  count);
  return launch(gelu_backward<T, 1, activation>, grid_of(count), kThreads, 0, stream, d_out, x, d_x, count);
}

// Calls `launch` with the format as a type and the activation as a constant.
template <class Launch>
int with_constants(Format format, Activation activation, Launch launch) {
  const auto of_format = [&](auto t) -> int {
    if (activation == Activation::kGeluErf) return launch(t, Constant<Activation::kGeluErf>{});
    return launch(t, Constant<Activation::kGelu>{});
  };
  switch (format) {
    case Format::kFp32: return of_format(float{});
    case Format::kBf16: return of_format(__nv_bfloat16{});
    case Format::kFp16: return of_format(__half{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int gelu_forward_cuda(Format format, Activation activation, const void* x, void* out, int64_t count, void* stream) {
  if (count == 0) return cudaSuccess;
  return with_constants(format, activation, [&](auto t, auto a) {
    return launch_forward<decltype(t), decltype(a)::value>(x, out, count, static_cast<cudaStream_t>(stream));
  });
}

int gelu_backward_cuda(Format format, Activation activation, const void* d_out, const void* x, void* d_x,
                       int64_t count, void* stream) {
  if (count == 0) return cudaSuccess;
  return with_constants(format, activation, [&](auto t, auto a) {
    return launch_backward<decltype(t), decltype(a)::value>(d_out, x, d_x, count, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace ml
