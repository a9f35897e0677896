// GELU on the CPU, forward and backward, element by element in fp32: y = a(x), d_x = d a'(x).

#include "gelu/cpu.h"

#include "common/activation_vec.h"

namespace {

template <class T, class A>
void forward_numbers(const void* x_all, void* out_all, int64_t begin, int64_t end) {
  const auto* x = static_cast<const typename T::Stored*>(x_all);
  auto* out = static_cast<typename T::Stored*>(out_all);
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) T::store(out + i, A::value(T::load(x + i)));
  if (i < end) T::store(out + i, A::value(T::load(x + i, end - i)), end - i);
}

template <class T, class A>
void backward_numbers(const void* d_out_all, const void* x_all, void* d_x_all, int64_t begin, int64_t end) {
  const auto* d_out = static_cast<const typename T::Stored*>(d_out_all);
  const auto* x = static_cast<const typename T::Stored*>(x_all);
  auto* d_x = static_cast<typename T::Stored*>(d_x_all);
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) T::store(d_x + i, T::load(d_out + i) * A::both(T::load(x + i)).slope);
  const int64_t rest = end - i;
  if (rest > 0) T::store(d_x + i, T::load(d_out + i, rest) * A::both(T::load(x + i, rest)).slope, rest);
}

template <class T>
void forward_stored(ml::Activation activation, const void* x, void* out, int64_t begin, int64_t end) {
  if (activation == ml::Activation::kGeluErf) return forward_numbers<T, GeluErf>(x, out, begin, end);
  forward_numbers<T, GeluTanh>(x, out, begin, end);
}

template <class T>
void backward_stored(ml::Activation activation, const void* d_out, const void* x, void* d_x, int64_t begin,
                     int64_t end) {
  if (activation == ml::Activation::kGeluErf) return backward_numbers<T, GeluErf>(d_out, x, d_x, begin, end);
  backward_numbers<T, GeluTanh>(d_out, x, d_x, begin, end);
}

void forward(ml::Format format, ml::Activation activation, const void* x, void* out, int64_t begin, int64_t end) {
  switch (format) {
    case ml::Format::kFp32: return forward_stored<Fp32>(activation, x, out, begin, end);
    case ml::Format::kBf16: return forward_stored<Bf16>(activation, x, out, begin, end);
    case ml::Format::kFp16: return forward_stored<Fp16>(activation, x, out, begin, end);
  }
}

void backward(ml::Format format, ml::Activation activation, const void* d_out, const void* x, void* d_x, int64_t begin,
              int64_t end) {
  switch (format) {
    case ml::Format::kFp32: return backward_stored<Fp32>(activation, d_out, x, d_x, begin, end);
    case ml::Format::kBf16: return backward_stored<Bf16>(activation, d_out, x, d_x, begin, end);
    case ml::Format::kFp16: return backward_stored<Fp16>(activation, d_out, x, d_x, begin, end);
  }
}

}  // namespace

namespace ml {
extern const GeluCpu ML_FOR_ISA(gelu) = {forward, backward};
}
