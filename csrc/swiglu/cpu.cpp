// Gated activations on the CPU, forward and backward, element by element in fp32:
//
//   forward    out = a(g) u
//   backward   d_up = d a(g)             d_gate = d u a'(g)

#include "swiglu/cpu.h"

#include "common/activation_vec.h"

namespace {

template <class T, class A>
void forward_rows(const void* gate_up, void* out_all, int64_t begin, int64_t end, int64_t half) {
  using Stored = typename T::Stored;
  for (int64_t row = begin; row < end; ++row) {
    const Stored* gate = static_cast<const Stored*>(gate_up) + row * 2 * half;
    const Stored* up = gate + half;
    Stored* out = static_cast<Stored*>(out_all) + row * half;
    const auto lanes = [&](int64_t i, int64_t count) __attribute__((always_inline)) {
      T::store(out + i, A::value(T::load(gate + i, count)) * T::load(up + i, count), count);
    };
    int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes) lanes(i, kLanes);
    if (i < half) lanes(i, half - i);
  }
}

template <class T, class A>
void backward_rows(const void* d_out_all, const void* gate_up, void* d_gate_up, int64_t begin, int64_t end,
                   int64_t half) {
  using Stored = typename T::Stored;
  for (int64_t row = begin; row < end; ++row) {
    const Stored* d_out = static_cast<const Stored*>(d_out_all) + row * half;
    const Stored* gate = static_cast<const Stored*>(gate_up) + row * 2 * half;
    const Stored* up = gate + half;
    Stored* d_gate = static_cast<Stored*>(d_gate_up) + row * 2 * half;
    Stored* d_up = d_gate + half;
    const auto lanes = [&](int64_t i, int64_t count) __attribute__((always_inline)) {
      const f32x16 d = T::load(d_out + i, count);
      const ValueAndSlope a = A::both(T::load(gate + i, count));
      T::store(d_gate + i, d * T::load(up + i, count) * a.slope, count);
      T::store(d_up + i, d * a.value, count);
    };
    int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes) lanes(i, kLanes);
    if (i < half) lanes(i, half - i);
  }
}

template <class T>
void forward_stored(ml::Activation activation, const void* gate_up, void* out, int64_t begin, int64_t end,
                    int64_t half) {
  switch (activation) {
    case ml::Activation::kSilu: return forward_rows<T, Silu>(gate_up, out, begin, end, half);
    case ml::Activation::kGelu: return forward_rows<T, GeluTanh>(gate_up, out, begin, end, half);
    case ml::Activation::kRelu: return forward_rows<T, Relu>(gate_up, out, begin, end, half);
    case ml::Activation::kGeluErf: return forward_rows<T, GeluErf>(gate_up, out, begin, end, half);
  }
}

template <class T>
void backward_stored(ml::Activation activation, const void* d_out, const void* gate_up, void* d_gate_up, int64_t begin,
                     int64_t end, int64_t half) {
  switch (activation) {
    case ml::Activation::kSilu: return backward_rows<T, Silu>(d_out, gate_up, d_gate_up, begin, end, half);
    case ml::Activation::kGelu: return backward_rows<T, GeluTanh>(d_out, gate_up, d_gate_up, begin, end, half);
    case ml::Activation::kRelu: return backward_rows<T, Relu>(d_out, gate_up, d_gate_up, begin, end, half);
    case ml::Activation::kGeluErf: return backward_rows<T, GeluErf>(d_out, gate_up, d_gate_up, begin, end, half);
  }
}

void forward(ml::Format format, ml::Activation activation, const void* gate_up, void* out, int64_t begin, int64_t end,
             int64_t half) {
  switch (format) {
    case ml::Format::kFp32: return forward_stored<Fp32>(activation, gate_up, out, begin, end, half);
    case ml::Format::kBf16: return forward_stored<Bf16>(activation, gate_up, out, begin, end, half);
    case ml::Format::kFp16: return forward_stored<Fp16>(activation, gate_up, out, begin, end, half);
  }
}

void backward(ml::Format format, ml::Activation activation, const void* d_out, const void* gate_up, void* d_gate_up,
              int64_t begin, int64_t end, int64_t half) {
  switch (format) {
    case ml::Format::kFp32: return backward_stored<Fp32>(activation, d_out, gate_up, d_gate_up, begin, end, half);
    case ml::Format::kBf16: return backward_stored<Bf16>(activation, d_out, gate_up, d_gate_up, begin, end, half);
    case ml::Format::kFp16: return backward_stored<Fp16>(activation, d_out, gate_up, d_gate_up, begin, end, half);
  }
}

}  // namespace

namespace ml {
extern const SwigluCpu ML_FOR_ISA(swiglu) = {forward, backward};
}
