// Tensors as the rotary kernels are told of them, checked: for the bindings of CPU and CUDA.
#pragma once

#include "common/tensors.h"
#include "rotary/shape.h"

namespace ml {

inline RotaryStrides rotary_strides(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

inline RotaryHeads rotary_heads(const Tensor& in, Tensor& out) {
  check_one_device("rotary", {&in, &out});
  STD_TORCH_CHECK(in.dim() == 4 && out.dim() == 4, "rotary takes q and k of [B, S, H, D]");
  for (int64_t i = 0; i < 4; ++i) STD_TORCH_CHECK(in.size(i) == out.size(i), "rotary writes a result like its input");
  STD_TORCH_CHECK(in.scalar_type() == out.scalar_type(), "rotary writes a result of its input's dtype");
  STD_TORCH_CHECK(in.size(3) < 2 || (in.stride(3) == 1 && out.stride(3) == 1), "rotary takes heads that are dense");
  return {in.const_data_ptr(), out.mutable_data_ptr(), in.size(2), rotary_strides(in), rotary_strides(out)};
}

inline RotaryShape rotary_shape(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                                bool interleaved, bool inverse) {
  check_one_device("rotary", {&q, &k, &cos, &sin});
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && cos.dim() == 3 && sin.dim() == 3 && q.size(0) == k.size(0) &&
                      q.size(1) == k.size(1) && q.size(3) == k.size(3) && q.scalar_type() == k.scalar_type(),
                  "rotary takes q[B, S, Hq, D], k[B, S, Hk, D] and cos, sin[B or 1, S, R/2]");
  const int64_t batch = q.size(0), tokens = q.size(1), half = cos.size(2);
  for (const Tensor* angle : {&cos, &sin})
    STD_TORCH_CHECK(angle->scalar_type() == ScalarType::Float && angle->is_contiguous() &&
                        (angle->size(0) == batch || angle->size(0) == 1) && angle->size(0) == cos.size(0) &&
                        angle->size(1) == tokens && angle->size(2) == half && 2 * half <= q.size(3),
                    "rotary takes contiguous fp32 cos and sin of [B or 1, S, R/2] with R <= D");
  return {.batch = batch, .tokens = tokens, .dim = q.size(3), .half = half,
          .angle_batch_stride = cos.size(0) == 1 ? 0 : tokens * half,
          .is_interleaved = interleaved, .sign = inverse ? -1.0f : 1.0f};
}

}  // namespace ml
