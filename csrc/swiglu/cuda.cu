// Gated activations on CUDA, forward and backward; see cpu.cpp for the equations. Arithmetic is fp32.
//
// A thread takes as many neighbouring columns of a row as a 16-byte access moves numbers, or one where rows do not lie
// on such boundaries.

#include "common/activation.cuh"
#include "common/cuda.cuh"
#include "swiglu/cuda.h"

namespace ml {
namespace {

constexpr int kThreads = 256;

// ceiling: 48 registers, 0 bytes of shared memory
template <class T, int size, Activation activation>
__global__ void __launch_bounds__(kThreads) gated_forward(const T* __restrict__ gate_up, T* __restrict__ out,
                                                          int64_t half) {
  using Run = Numbers<T, size>;
  const int64_t row = blockIdx.x, column = (int64_t(blockIdx.y) * kThreads + threadIdx.x) * size;
  if (column >= half) return;
  const Run gate = *reinterpret_cast<const Run*>(gate_up + row * 2 * half + column);
  const Run up = *reinterpret_cast<const Run*>(gate_up + row * 2 * half + half + column);
  Run result;
#pragma unroll
  for (int i = 0; i < size; ++i)
    result.values[i] =
        from_float<T>(value_and_slope<activation>(to_float(gate.values[i])).value * to_float(up.values[i]));
  *reinterpret_cast<Run*>(out + row * half + column) = result;
}

// ceiling: 48 registers, 0 bytes of shared memory
template <class T, int size, Activation activation>
__global__ void __launch_bounds__(kThreads)
    gated_backward(const T* __restrict__ d_out, const T* __restrict__ gate_up, T* __restrict__ d_gate_up,
                   int64_t half) {
  using Run = Numbers<T, size>;
  const int64_t row = blockIdx.x, column = (int64_t(blockIdx.y) * kThreads + threadIdx.x) * size;
  if (column >= half) return;
  const Run d = *reinterpret_cast<const Run*>(d_out + row * half + column);
  const Run gate = *reinterpret_cast<const Run*>(gate_up + row * 2 * half + column);
  const Run up = *reinterpret_cast<const Run*>(gate_up + row * 2 * half + half + column);
  Run d_gate, d_up;
#pragma unroll
  for (int i = 0; i < size; ++i) {
    const ValueAndSlope a = value_and_slope<activation>(to_float(gate.values[i]));
    const float upstream = to_float(d.values[i]);
    d_gate.values[i] = from_float<T>(upstream * to_float(up.values[i]) * a.slope);
    d_up.values[i] = from_float<T>(upstream * a.value);
  }
  *reinterpret_cast<Run*>(d_gate_up + row * 2 * half + column) = d_gate;
  *reinterpret_cast<Run*>(d_gate_up + row * 2 * half + half + column) = d_up;
}

Grid grid_of(int64_t rows, int64_t columns) { return {rows, (columns + kThreads - 1) / kThreads}; }

}  // namespace

int swiglu_forward_cuda(Format format, Activation activation, const void* gate_up_, void* out_, int64_t rows,
                        int64_t half, void* stream) {
  int code = cudaSuccess;
  if (rows * half == 0) return code;
  with_format_and_activation(format, activation, [&](auto t, auto a) {
    using T = decltype(t);
    constexpr int kSize = kPackSize<T>;
    constexpr Activation kActivation = decltype(a)::value;
    const auto* gate_up = static_cast<const T*>(gate_up_);
    auto* out = static_cast<T*>(out_);
    const auto s = static_cast<cudaStream_t>(stream);
    code = half % kSize == 0 && on_16_bytes(gate_up, out)
               ? launch(gated_forward<T, kSize, kActivation>, grid_of(rows, half / kSize), kThreads, 0, s, gate_up, out,
                        half)
               : launch(gated_forward<T, 1, kActivation>, grid_of(rows, half), kThreads, 0, s, gate_up, out, half);
  });
  return code;
}

int swiglu_backward_cuda(Format format, Activation activation, const void* d_out_, const void* gate_up_,
                         void* d_gate_up_, int64_t rows, int64_t half, void* stream) {
  int code = cudaSuccess;
  if (rows * half == 0) return code;
  with_format_and_activation(format, activation, [&](auto t, auto a) {
    using T = decltype(t);
    constexpr int kSize = kPackSize<T>;
    constexpr Activation kActivation = decltype(a)::value;
    const auto *d_out = static_cast<const T*>(d_out_), *gate_up = static_cast<const T*>(gate_up_);
    auto* d_gate_up = static_cast<T*>(d_gate_up_);
    const auto s = static_cast<cudaStream_t>(stream);
    code = half % kSize == 0 && on_16_bytes(d_out, gate_up, d_gate_up)
               ? launch(gated_backward<T, kSize, kActivation>, grid_of(rows, half / kSize), kThreads, 0, s, d_out,
                        gate_up, d_gate_up, half)
               : launch(gated_backward<T, 1, kActivation>, grid_of(rows, half), kThreads, 0, s, d_out, gate_up,
                        d_gate_up, half);
  });
  return code;
}

}  // namespace ml
