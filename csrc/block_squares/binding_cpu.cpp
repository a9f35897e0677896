// Sums of squares over blocks on the CPU, as an operator on tensors.

#include "block_squares/cpu.h"
#include "common/instruction_set.h"
#include "common/tensors.h"

using ml::ScalarType;
using ml::Tensor;

namespace {

Tensor block_squares_cpu(const Tensor& values, int64_t isa) {
  STD_TORCH_CHECK(values.dim() == 1 && values.is_contiguous() && values.size(0) % ml::kSquaresPerBlock == 0,
                  "block_squares takes a contiguous vector of a multiple of 256 values");
  const int64_t blocks = values.size(0) / ml::kSquaresPerBlock;
  const ml::Format format = ml::format_of(values);
  Tensor sums = torch::stable::new_empty(values, {blocks}, ScalarType::Double);
  const auto& kernels = ML_KERNELS(block_squares, isa);
  const void* values_data = values.const_data_ptr();
  double* sums_data = static_cast<double*>(sums.mutable_data_ptr());
  torch::stable::parallel_for(0, blocks, ml::grain(ml::kSquaresPerBlock), [&](int64_t begin, int64_t end) {
    kernels.sum(format, values_data, sums_data, begin, end);
  });
  return sums;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_lite_cpu, m) {
  m.def("block_squares(Tensor values, int isa=-1) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_lite_cpu, CPU, m) {
  m.impl("block_squares", TORCH_BOX(&block_squares_cpu));
}
