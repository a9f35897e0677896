// Tensors as the gated activations are told of them, checked: for the bindings of CPU and CUDA.
#pragma once

#include "common/activation.h"
#include "common/tensors.h"

namespace ml {

struct GatedShape {
  int64_t rows, half;
};

inline GatedShape gated_shape(const Tensor& gate_up) {
  STD_TORCH_CHECK(gate_up.dim() >= 1 && gate_up.size(-1) % 2 == 0, "swiglu takes gate_up[..., 2F]");
  const int64_t width = gate_up.size(-1);
  return {width > 0 ? gate_up.numel() / width : 0, width / 2};
}

inline Tensor gated_output(const Tensor& gate_up) {
  std::vector<int64_t> shape(gate_up.sizes().begin(), gate_up.sizes().end());
  shape.back() /= 2;
  return torch::stable::new_empty(gate_up, shape);
}

// The gradient of the result of `op`, which has `size` numbers, made from `input`.
inline void check_d_out(const char* op, const Tensor& d_out, const Tensor& input, int64_t size) {
  check_one_device(op, {&input, &d_out});
  STD_TORCH_CHECK(d_out.numel() == size && d_out.scalar_type() == input.scalar_type(), op,
                  " takes d_out like the result, of the dtype of the input");
}

inline Activation activation_of(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number < kNumActivations, "there is no activation ", number);
  return static_cast<Activation>(number);
}

}  // namespace ml
