// RMSNorm and LayerNorm as operators on tensors: what the bindings of the two share.
#pragma once

#include <utility>

#include "common/instruction_set.h"
#include "common/norm.h"
#include "common/tensors.h"

namespace ml {

struct NormShape {
  int64_t rows, dim;
};

// Of x[..., D]; the others, where they are not null, have x's shape and dtype (`alike`) or are [D] in one dtype.
inline NormShape norm_shape(const char* op, const Tensor& x, const Tensor* alike, const Tensor& weight,
                            const Tensor* bias) {
  check_one_device(op, {&x, alike, &weight, bias});
  STD_TORCH_CHECK(x.dim() >= 1 && weight.dim() == 1 && x.size(-1) == weight.size(0) && weight.size(0) > 0, op,
                  " takes x[..., D] and weight[D]");
  STD_TORCH_CHECK(bias == nullptr || (bias->dim() == 1 && bias->size(0) == weight.size(0) &&
                                      bias->scalar_type() == weight.scalar_type()),
                  op, " takes a bias like the weight");
  STD_TORCH_CHECK(alike == nullptr || (alike->numel() == x.numel() && alike->dim() == x.dim() &&
                                       alike->size(-1) == x.size(-1) && alike->scalar_type() == x.scalar_type()),
                  op, " takes a second tensor like the first");
  return {x.numel() / weight.size(0), weight.size(0)};
}

inline void check_norm_backward(const char* op, const Tensor& dy, const Tensor& x, const Tensor* mean,
                                const Tensor& rstd, int64_t rows) {
  check_one_device(op, {&x, &dy, mean, &rstd});
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type() && dy.numel() == x.numel(), op, " takes dy like x");
  for (const Tensor* numbers : {mean, &rstd})
    STD_TORCH_CHECK(numbers == nullptr || (numbers->numel() == rows && numbers->scalar_type() == ScalarType::Float &&
                                           numbers->is_contiguous()),
                    op, " takes one fp32 number a row in mean and rstd");
}

inline float* floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
inline const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

}  // namespace ml
