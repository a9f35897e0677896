// Sums of squares over blocks on the CPU, as operators on tensors.

#include "common/instruction_set.h"
#include "common/tensors.h"
#include "block_squares/cpu.h"

using ml::ScalarType;
using ml::Tensor;

namespace {

Tensor block_squares_cpu(const Tensor& values, int64_t isa) {
  STD_TORCH_CHECK(values.dim() == 1 && values.stride(0) == 1 && values.size(0) % ml::kSquaresPerBlock == 0 &&
                      values.scalar_type() == ScalarType::Float,
                  "block_squares takes contiguous fp32 values, a multiple of 256 of them");
  const int64_t blocks = values.size(0) / ml::kSquaresPerBlock;
  Tensor sums = torch::stable::new_empty(values, {blocks}, ScalarType::Double);
  const auto& kernels = ML_KERNELS(block_squares, isa);
  const float* values_data = static_cast<const float*>(values.const_data_ptr());
  double* sums_data = static_cast<double*>(sums.mutable_data_ptr());
  torch::stable::parallel_for(0, blocks, ml::grain(ml::kSquaresPerBlock), [&](int64_t begin, int64_t end) {
    kernels.sum(values_data, sums_data, begin, end);
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
