// AdamW in one pass over memory; update.h has the equations.

// A fused multiply-add would round once where other instruction sets, CUDA and the reference round twice.
#ifdef __clang__
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include "adamw/cpu.h"

#include "common/vec.h"

#ifdef __AVX2__
#include <immintrin.h>  // intrinsics are inlined always: no copy of them reaches the linker
#endif

namespace {

using ml::AdamWCoefficients;
using ml::AdamWMemory;

constexpr int64_t kTile = 512;  // elements whose gradients and new weights wait in the first cache for their conversion

// Plain loops: the compiler keeps them in registers of each instruction set's width, which wide vectors exceed.
ML_INLINE void update_tile(const float* __restrict__ gradients, float* __restrict__ first, float* __restrict__ second,
                           float* __restrict__ weights, const AdamWCoefficients c, float decay, int64_t count) {
  const bool is_near = c.mean_weight > 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float g = gradients[i] * c.factor;
    const float mean = (is_near ? first[i] : g) + c.mean_weight * (g - first[i]);
    const float square = c.square_keep * second[i] + c.square_weight * (g * g);
    const float decayed = weights[i] - decay * weights[i];
    first[i] = mean;
    second[i] = square;
    weights[i] = decayed - (c.step_size * mean) / (__builtin_sqrtf(square) + c.eps);
  }
}

template <class T>
ML_INLINE void widen(const typename T::Stored* source, float* target, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) Fp32::store(target + i, T::load(source + i));
  if (i < count) Fp32::store(target + i, T::load(source + i, count - i), count - i);
}

// Writes sixteen parameters past the caches, where the instruction set can: nothing reads them before the next forward,
// and a line that need not be read first costs half the traffic. `target` lies on a multiple of 32 bytes.
template <class T>
ML_INLINE void stream(typename T::Stored* target, f32x16 lanes) {
#ifdef __AVX2__
  alignas(64) typename T::Stored packed[kLanes];
  T::store(packed, lanes);
  for (size_t i = 0; i < sizeof(packed) / 32; ++i)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(target) + i, reinterpret_cast<const __m256i*>(packed)[i]);
#else
  T::store(target, lanes);
#endif
}

template <class T>
ML_INLINE void write_parameters(const float* weights, typename T::Stored* target, int64_t count) {
  int64_t i = 0;
  if (reinterpret_cast<uintptr_t>(target) % 32 == 0)
    for (; i + kLanes <= count; i += kLanes) stream<T>(target + i, Fp32::load(weights + i));
  for (; i + kLanes <= count; i += kLanes) T::store(target + i, Fp32::load(weights + i));
  if (i < count) T::store(target + i, Fp32::load(weights + i, count - i), count - i);
}

void widen_from(ml::Format format, const void* source, int64_t at, float* target, int64_t count) {
  const auto* half = static_cast<const uint16_t*>(source) + at;
  return format == ml::Format::kBf16 ? widen<Bf16>(half, target, count) : widen<Fp16>(half, target, count);
}

void write_to(ml::Format format, const float* weights, void* target, int64_t at, int64_t count) {
  switch (format) {
    case ml::Format::kFp32: return write_parameters<Fp32>(weights, static_cast<float*>(target) + at, count);
    case ml::Format::kBf16: return write_parameters<Bf16>(weights, static_cast<uint16_t*>(target) + at, count);
    case ml::Format::kFp16: return write_parameters<Fp16>(weights, static_cast<uint16_t*>(target) + at, count);
  }
}

void update(const AdamWMemory& memory, const AdamWCoefficients& coefficients, float decay, int64_t begin,
            int64_t end) {
  alignas(64) float widened[kTile];
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t count = end - at < kTile ? end - at : kTile;
    const float* gradients = widened;
    if (memory.gradient_format == ml::Format::kFp32)
      gradients = static_cast<const float*>(memory.gradients) + at;
    else
      widen_from(memory.gradient_format, memory.gradients, at, widened, count);
    float* weights = memory.weights + at;
    update_tile(gradients, memory.first + at, memory.second + at, weights, coefficients, decay, count);
    if (memory.parameters != nullptr) write_to(memory.parameter_format, weights, memory.parameters, at, count);
  }
#ifdef __AVX2__
  _mm_sfence();  // what was streamed is there before other threads hear that this one is done
#endif
}

}  // namespace

namespace ml {
extern const AdamWCpu ML_FOR_ISA(adamw) = {update};
}
