// SwiGLU on the CPU, forward and backward, element by element in fp32:
//
//   forward    out = g s u               with s = 1 / (1 + e^-g)
//   backward   d_up = d g s              d_gate = d u s (1 + g (1 - s))

#include "swiglu/cpu.h"

#include "common/vec.h"

namespace {

ML_INLINE f32x16 sigmoid(f32x16 x) { return splat(1.0f) / (splat(1.0f) + exp(-x)); }

template <class T>
ML_INLINE void forward_lanes(const typename T::Stored* gate, const typename T::Stored* up, typename T::Stored* out,
                             int64_t count) {
  const f32x16 g = T::load(gate, count);
  T::store(out, g * sigmoid(g) * T::load(up, count), count);
}

template <class T>
void forward_rows(const void* gate_up, void* out_all, int64_t begin, int64_t end, int64_t half) {
  using Stored = typename T::Stored;
  for (int64_t row = begin; row < end; ++row) {
    const Stored* gate = static_cast<const Stored*>(gate_up) + row * 2 * half;
    Stored* out = static_cast<Stored*>(out_all) + row * half;
    int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes) forward_lanes<T>(gate + i, gate + half + i, out + i, kLanes);
    if (i < half) forward_lanes<T>(gate + i, gate + half + i, out + i, half - i);
  }
}

template <class T>
ML_INLINE void backward_lanes(const typename T::Stored* d_out, const typename T::Stored* gate,
                              const typename T::Stored* up, typename T::Stored* d_gate, typename T::Stored* d_up,
                              int64_t count) {
  const f32x16 d = T::load(d_out, count), g = T::load(gate, count);
  const f32x16 s = sigmoid(g);
  T::store(d_up, d * (g * s), count);
  T::store(d_gate, d * T::load(up, count) * (s * (splat(1.0f) + g * (splat(1.0f) - s))), count);
}

template <class T>
void backward_rows(const void* d_out_all, const void* gate_up, void* d_gate_up, int64_t begin, int64_t end,
                   int64_t half) {
  using Stored = typename T::Stored;
  for (int64_t row = begin; row < end; ++row) {
    const Stored* d = static_cast<const Stored*>(d_out_all) + row * half;
    const Stored* gate = static_cast<const Stored*>(gate_up) + row * 2 * half;
    Stored* d_gate = static_cast<Stored*>(d_gate_up) + row * 2 * half;
    int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes)
      backward_lanes<T>(d + i, gate + i, gate + half + i, d_gate + i, d_gate + half + i, kLanes);
    if (i < half) backward_lanes<T>(d + i, gate + i, gate + half + i, d_gate + i, d_gate + half + i, half - i);
  }
}

void forward(ml::Format format, const void* gate_up, void* out, int64_t begin, int64_t end, int64_t half) {
  switch (format) {
    case ml::Format::kFp32: return forward_rows<Fp32>(gate_up, out, begin, end, half);
    case ml::Format::kBf16: return forward_rows<Bf16>(gate_up, out, begin, end, half);
    case ml::Format::kFp16: return forward_rows<Fp16>(gate_up, out, begin, end, half);
  }
}

void backward(ml::Format format, const void* d_out, const void* gate_up, void* d_gate_up, int64_t begin, int64_t end,
              int64_t half) {
  switch (format) {
    case ml::Format::kFp32: return backward_rows<Fp32>(d_out, gate_up, d_gate_up, begin, end, half);
    case ml::Format::kBf16: return backward_rows<Bf16>(d_out, gate_up, d_gate_up, begin, end, half);
    case ml::Format::kFp16: return backward_rows<Fp16>(d_out, gate_up, d_gate_up, begin, end, half);
  }
}

}  // namespace

namespace ml {
extern const SwigluCpu ML_FOR_ISA(swiglu) = {forward, backward};
}
