// Cross-entropy over a shard of a vocabulary on the CPU, as operators on tensors.

#include "common/instruction_set.h"
#include "cross_entropy/cpu.h"
#include "cross_entropy/tensors.h"

using ml::Tensor;

namespace {

Tensor statistics_cpu(const Tensor& logits, const Tensor& targets, int64_t start, int64_t size, int64_t ignored,
                      int64_t isa) {
  const ml::CrossEntropyShard shard = ml::cross_entropy_shard(logits, targets, start, size, ignored);
  Tensor out = ml::cross_entropy_statistics(logits);
  const ml::CrossEntropyStatistics statistics = ml::cross_entropy_rows(out);
  const auto& kernels = ML_KERNELS_WITH_BF16(cross_entropy, isa);
  const void* data = logits.const_data_ptr();
  torch::stable::parallel_for(0, logits.size(0), ml::grain(shard.size), [&](int64_t begin, int64_t end) {
    kernels.statistics(shard, data, statistics, begin, end);
  });
  return out;
}

void gradient_cpu(const Tensor& logits, const Tensor& targets, const Tensor& maxima, const Tensor& sums,
                  const Tensor& upstream, int64_t ignored, int64_t start, int64_t size, int64_t vocab_size,
                  double label_smoothing, double z_loss, Tensor& gradient, int64_t isa) {
  const ml::CrossEntropyShard shard = ml::cross_entropy_shard(logits, targets, start, size, ignored);
  const ml::CrossEntropySlope slope =
      ml::cross_entropy_slope(logits, maxima, sums, upstream, gradient, vocab_size, label_smoothing, z_loss);
  const auto& kernels = ML_KERNELS_WITH_BF16(cross_entropy, isa);
  const void* data = logits.const_data_ptr();
  void* gradient_data = gradient.mutable_data_ptr();
  if (gradient_data != data) ml::use_huge_pages(gradient);
  torch::stable::parallel_for(0, logits.size(0), ml::grain(shard.stride), [&](int64_t begin, int64_t end) {
    kernels.gradient(shard, data, slope, gradient_data, begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_lite_cpu, m) {
  m.def(
      "cross_entropy_statistics(Tensor logits, Tensor targets, int start, int size, int ignored, int isa=-1) "
      "-> Tensor");
  m.def(
      "cross_entropy_gradient(Tensor logits, Tensor targets, Tensor maxima, Tensor sums, Tensor upstream, int ignored, "
      "int start, int size, int vocab_size, float label_smoothing, float z_loss, Tensor(a!) gradient, int isa=-1) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_lite_cpu, CPU, m) {
  m.impl("cross_entropy_statistics", TORCH_BOX(&statistics_cpu));
  m.impl("cross_entropy_gradient", TORCH_BOX(&gradient_cpu));
}
