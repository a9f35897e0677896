// Rotary position embedding on CUDA; rotary/shape.h says what it computes. Arithmetic is fp32, rounded once.
//
// A block rotates the heads of one token, q's and then k's. A thread has the same pairs in each head that it comes to,
// so it reads their cosines and sines once. It holds as many pairs as a 16-byte access moves numbers, or one where the
// tensors do not allow that.

#include "common/cuda.cuh"
#include "rotary/cuda.h"

namespace ml {
namespace {

constexpr int kMaxThreads = 256;

// The two runs of `size` numbers that a thread rotates: halves lie `half` apart, interleaved pairs side by side.
template <class T, int size, bool is_interleaved>
__device__ __forceinline__ void rotate_pairs(const T* in, T* out, int64_t half, const float* cos, const float* sin) {
  using Run = Numbers<T, size>;
  const int64_t second = is_interleaved ? size : half;
  const Run a = *reinterpret_cast<const Run*>(in), b = *reinterpret_cast<const Run*>(in + second);
  Run a_out, b_out;
#pragma unroll
  for (int i = 0; i < size; ++i) {
    if constexpr (is_interleaved) {  // a and b are one run of 2 size numbers
      const float x = to_float(2 * i < size ? a.values[2 * i % size] : b.values[2 * i % size]);
      const float y = to_float(2 * i + 1 < size ? a.values[(2 * i + 1) % size] : b.values[(2 * i + 1) % size]);
      (2 * i < size ? a_out : b_out).values[2 * i % size] = from_float<T>(x * cos[i] - y * sin[i]);
      (2 * i + 1 < size ? a_out : b_out).values[(2 * i + 1) % size] = from_float<T>(y * cos[i] + x * sin[i]);
    } else {
      const float x = to_float(a.values[i]), y = to_float(b.values[i]);
      a_out.values[i] = from_float<T>(x * cos[i] - y * sin[i]);
      b_out.values[i] = from_float<T>(y * cos[i] + x * sin[i]);
    }
  }
  *reinterpret_cast<Run*>(out) = a_out;
  *reinterpret_cast<Run*>(out + second) = b_out;
}

// Block (token, batch); thread (run, slot) rotates run `run` of the heads slot, slot + number of slots, ...
// ceiling: 48 registers, 0 bytes of shared memory
template <class T, int size, bool is_interleaved>
__global__ void __launch_bounds__(kMaxThreads)
    rotate(RotaryShape shape, RotaryHeads q, RotaryHeads k, const float* __restrict__ cos_all,
           const float* __restrict__ sin_all) {
  const int64_t t = blockIdx.x, b = blockIdx.y;
  const int64_t num_runs = shape.half / size;
  for (int64_t run = threadIdx.x; run < num_runs; run += blockDim.x) {
    const int64_t angle = b * shape.angle_batch_stride + t * shape.half + run * size;
    float cos[size], sin[size];
#pragma unroll
    for (int i = 0; i < size; ++i) {
      cos[i] = cos_all[angle + i];
      sin[i] = shape.sign * sin_all[angle + i];
    }
    const int64_t first = is_interleaved ? 2 * run * size : run * size;
    for (int64_t h = threadIdx.y; h < q.count + k.count; h += blockDim.y) {
      const bool is_query = h < q.count;
      const RotaryHeads& heads = is_query ? q : k;
      const int64_t head = is_query ? h : h - q.count;
      const RotaryStrides &from = heads.in_strides, &to = heads.out_strides;
      const T* in = static_cast<const T*>(heads.in) + b * from.batch + t * from.token + head * from.head;
      T* out = static_cast<T*>(heads.out) + b * to.batch + t * to.token + head * to.head;
      rotate_pairs<T, size, is_interleaved>(in + first, out + first, shape.half, cos, sin);
    }
  }
}

// Block (token, batch): what lies behind the rotated numbers of each head is copied.
// ceiling: 40 registers, 0 bytes of shared memory
template <class T>
__global__ void __launch_bounds__(kMaxThreads) copy_rest(RotaryShape shape, RotaryHeads q, RotaryHeads k) {
  const int64_t t = blockIdx.x, b = blockIdx.y;
  for (int64_t h = threadIdx.y; h < q.count + k.count; h += blockDim.y) {
    const bool is_query = h < q.count;
    const RotaryHeads& heads = is_query ? q : k;
    const int64_t head = is_query ? h : h - q.count;
    const RotaryStrides &from = heads.in_strides, &to = heads.out_strides;
    const T* in = static_cast<const T*>(heads.in) + b * from.batch + t * from.token + head * from.head;
    T* out = static_cast<T*>(heads.out) + b * to.batch + t * to.token + head * to.head;
    for (int64_t i = 2 * shape.half + threadIdx.x; i < shape.dim; i += blockDim.x) out[i] = in[i];
  }
}

// ---- launchers

bool allows_runs(const RotaryStrides& strides, int64_t size) {
  return strides.batch % size == 0 && strides.token % size == 0 && strides.head % size == 0;
}

bool allows_runs(const RotaryShape& shape, const RotaryHeads& q, const RotaryHeads& k, int64_t size) {
  bool allowed = shape.half % size == 0;
  for (const RotaryHeads& heads : {q, k})
    allowed = allowed && on_16_bytes(heads.in, heads.out) && allows_runs(heads.in_strides, size) &&
              allows_runs(heads.out_strides, size);
  return allowed;
}

dim3 block_of(int64_t columns, int64_t num_heads) {
  const int64_t width = columns < 1 ? 1 : columns < kMaxThreads ? columns : kMaxThreads;
  const int64_t slots = kMaxThreads / width;
  return dim3(static_cast<unsigned>(width), static_cast<unsigned>(slots < num_heads ? slots : num_heads));
}

template <class T, int size, bool is_interleaved>
int launch_rotate(const RotaryShape& shape, const RotaryHeads& q, const RotaryHeads& k, const float* cos,
                  const float* sin, cudaStream_t stream) {
  const Grid grid(shape.tokens, shape.batch);
  const int64_t num_heads = q.count + k.count;
  int code = cudaSuccess;
  if (shape.half > 0)
    code = launch(rotate<T, size, is_interleaved>, grid, block_of(shape.half / size, num_heads), 0, stream, shape, q, k,
                  cos, sin);
  const bool in_place = q.in == q.out && k.in == k.out;
  if (code != cudaSuccess || 2 * shape.half == shape.dim || in_place) return code;
  return launch(copy_rest<T>, grid, block_of(shape.dim - 2 * shape.half, num_heads), 0, stream, shape, q, k);
}

template <class T>
int launch_stored(const RotaryShape& shape, const RotaryHeads& q, const RotaryHeads& k, const float* cos,
                  const float* sin, cudaStream_t stream) {
  constexpr int kSize = kPackSize<T>;
  const bool runs = allows_runs(shape, q, k, kSize);
  if (shape.is_interleaved)
    return runs ? launch_rotate<T, kSize, true>(shape, q, k, cos, sin, stream)
                : launch_rotate<T, 1, true>(shape, q, k, cos, sin, stream);
  return runs ? launch_rotate<T, kSize, false>(shape, q, k, cos, sin, stream)
              : launch_rotate<T, 1, false>(shape, q, k, cos, sin, stream);
}

}  // namespace

int rotary_cuda(Format format, const RotaryShape& shape, const RotaryHeads& q, const RotaryHeads& k, const float* cos,
                const float* sin, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  if (shape.batch * shape.tokens * (q.count + k.count) * shape.dim == 0) return cudaSuccess;
  switch (format) {
    case Format::kFp32: return launch_stored<float>(shape, q, k, cos, sin, stream);
    case Format::kBf16: return launch_stored<__nv_bfloat16>(shape, q, k, cos, sin, stream);
    case Format::kFp16: return launch_stored<__half>(shape, q, k, cos, sin, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace ml
