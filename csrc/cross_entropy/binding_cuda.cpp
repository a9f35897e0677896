// Cross-entropy over a shard of a vocabulary on CUDA, as operators on tensors.

#include "common/cuda_error.h"
#include "cross_entropy/cuda.h"
#include "cross_entropy/tensors.h"

using ml::Tensor;

namespace {

void check_cuda(int code) { ml::check_cuda("cross_entropy", code); }

// `stream` is the cudaStream_t as an integer: reading the current stream takes torch 2.13's ABI, or CUDA headers.
Tensor statistics_cuda(const Tensor& logits, const Tensor& targets, int64_t start, int64_t size, int64_t ignored,
                       int64_t stream) {
  const ml::CrossEntropyShard shard = ml::cross_entropy_shard(logits, targets, start, size, ignored);
  Tensor out = ml::cross_entropy_statistics(logits);
  check_cuda(ml::cross_entropy_statistics_cuda(shard, logits.const_data_ptr(), ml::cross_entropy_rows(out),
                                               logits.size(0), reinterpret_cast<void*>(stream)));
  return out;
}

void gradient_cuda(const Tensor& logits, const Tensor& targets, const Tensor& maxima, const Tensor& sums,
                   const Tensor& upstream, int64_t ignored, int64_t start, int64_t size, int64_t vocab_size,
                   double label_smoothing, double z_loss, Tensor& gradient, int64_t stream) {
  const ml::CrossEntropyShard shard = ml::cross_entropy_shard(logits, targets, start, size, ignored);
  const ml::CrossEntropySlope slope =
      ml::cross_entropy_slope(logits, maxima, sums, upstream, gradient, vocab_size, label_smoothing, z_loss);
  check_cuda(ml::cross_entropy_gradient_cuda(shard, logits.const_data_ptr(), slope, gradient.mutable_data_ptr(),
                                             logits.size(0), reinterpret_cast<void*>(stream)));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_lite_cuda, m) {
  m.def(
      "cross_entropy_statistics(Tensor logits, Tensor targets, int start, int size, int ignored, int stream) "
      "-> Tensor");
  m.def(
      "cross_entropy_gradient(Tensor logits, Tensor targets, Tensor maxima, Tensor sums, Tensor upstream, int ignored, "
      "int start, int size, int vocab_size, float label_smoothing, float z_loss, Tensor(a!) gradient, int stream) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_lite_cuda, ML_CUDA_KEY, m) {
  m.impl("cross_entropy_statistics", TORCH_BOX(&statistics_cuda));
  m.impl("cross_entropy_gradient", TORCH_BOX(&gradient_cuda));
}
