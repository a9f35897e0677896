// Sums of squares over blocks on CUDA, as an operator on tensors.

#include "block_squares/cuda.h"
#include "common/cuda_error.h"
#include "common/tensors.h"

using ml::ScalarType;
using ml::Tensor;

namespace {

Tensor block_squares_cuda(const Tensor& values, int64_t stream) {
  STD_TORCH_CHECK(values.dim() == 1 && values.is_contiguous() && values.size(0) % 256 == 0,
                  "block_squares takes a contiguous vector of a multiple of 256 values");
  const int64_t blocks = values.size(0) / 256;
  const ml::Format format = ml::format_of(values);
  Tensor sums = torch::stable::new_empty(values, {blocks}, ScalarType::Double);
  ml::check_cuda("block_squares", ml::block_squares_cuda(format, values.const_data_ptr(),
                                                         static_cast<double*>(sums.mutable_data_ptr()), blocks,
                                                         reinterpret_cast<void*>(stream)));
  return sums;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_lite_cuda, m) {
  m.def("block_squares(Tensor values, int stream) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_lite_cuda, ML_CUDA_KEY, m) {
  m.impl("block_squares", TORCH_BOX(&block_squares_cuda));
}
