// The exact sum on the CPU, as an operator on tensors.

#include "common/instruction_set.h"
#include "common/tensors.h"
#include "exact_sum/cpu.h"

using ml::ScalarType;
using ml::Tensor;

namespace {

constexpr int64_t kNumbersPerItem = 1 << 14;

Tensor exact_sum_cpu(const Tensor& values, int64_t isa) {
  STD_TORCH_CHECK(values.dim() == 1 && values.is_contiguous() && values.scalar_type() == ScalarType::Double,
                  "exact_sum takes a contiguous fp64 vector");
  const int64_t size = values.numel(), items = (size + kNumbersPerItem - 1) / kNumbersPerItem;
  Tensor limbs = torch::stable::new_zeros(values, {ml::kExactLength}, ScalarType::Long);
  const auto& kernels = ML_KERNELS(exact_sum, isa);
  const double* values_data = static_cast<const double*>(values.const_data_ptr());
  int64_t* total = static_cast<int64_t*>(limbs.mutable_data_ptr());
  std::vector<int64_t> parts(items * ml::kExactLength);
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item)
      kernels.add(values_data, parts.data() + item * ml::kExactLength, item * kNumbersPerItem,
                  std::min(size, (item + 1) * kNumbersPerItem));
  });
  for (size_t i = 0; i < parts.size(); ++i) total[i % ml::kExactLength] += parts[i];
  return limbs;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_lite_cpu, m) {
  m.def("exact_sum(Tensor values, int isa=-1) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_lite_cpu, CPU, m) {
  m.impl("exact_sum", TORCH_BOX(&exact_sum_cpu));
}
