// What both bindings check and take from tensors: all of it before a pointer is used.
#pragma once

#include "common/tensors.h"
#include "cross_entropy/shard.h"

namespace ml {

inline CrossEntropyShard cross_entropy_shard(const Tensor& logits, const Tensor& targets, int64_t start, int64_t size,
                                             int64_t ignored) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(), "cross_entropy takes contiguous logits[T, W]");
  STD_TORCH_CHECK(targets.dim() == 1 && targets.is_contiguous() && targets.scalar_type() == ScalarType::Long &&
                      targets.size(0) == logits.size(0) && targets.device() == logits.device(),
                  "cross_entropy takes contiguous int64 targets[T] on the device of the logits");
  STD_TORCH_CHECK(start >= 0 && size >= 0 && size <= logits.size(1),
                  "cross_entropy takes a shard of at most as many columns as the logits have");
  const auto* data = static_cast<const int64_t*>(targets.const_data_ptr());
  return {format_of(logits), logits.size(1), start, size, data, ignored};
}

// statistics[4, T]: maxima, sums, the targets' logits, totals.
inline Tensor cross_entropy_statistics(const Tensor& logits) {
  return torch::stable::new_empty(logits, {4, logits.size(0)}, ScalarType::Float);
}

inline CrossEntropyStatistics cross_entropy_rows(Tensor& statistics) {
  const int64_t rows = statistics.size(1);
  auto* data = static_cast<float*>(statistics.mutable_data_ptr());
  return {data, data + rows, data + 2 * rows, data + 3 * rows};
}

inline CrossEntropySlope cross_entropy_slope(const Tensor& logits, const Tensor& maxima, const Tensor& sums,
                                             const Tensor& upstream, const Tensor& gradient, int64_t vocab_size,
                                             double label_smoothing, double z_loss) {
  for (const Tensor* rows : {&maxima, &sums, &upstream})
    STD_TORCH_CHECK(rows->dim() == 1 && rows->is_contiguous() && rows->scalar_type() == ScalarType::Float &&
                        rows->size(0) == logits.size(0) && rows->device() == logits.device(),
                    "cross_entropy_gradient takes contiguous fp32 maxima[T], sums[T] and upstream[T]");
  STD_TORCH_CHECK(gradient.dim() == 2 && gradient.is_contiguous() && gradient.scalar_type() == logits.scalar_type() &&
                      gradient.size(0) == logits.size(0) && gradient.size(1) == logits.size(1) &&
                      gradient.device() == logits.device() && vocab_size > 0,
                  "cross_entropy_gradient takes a contiguous gradient like the logits, which it may lie over");
  const auto data = [](const Tensor& rows) { return static_cast<const float*>(rows.const_data_ptr()); };
  return {data(maxima), data(sums), data(upstream), static_cast<float>(label_smoothing),
          static_cast<float>(label_smoothing / static_cast<double>(vocab_size)), static_cast<float>(z_loss)};
}

}  // namespace ml
