// Accumulation on the CPU, as operators on tensors.

#include "common/instruction_set.h"
#include "common/tensors.h"
#include "accumulate/cpu.h"

using ml::ScalarType;
using ml::Tensor;

namespace {

void accumulate_cpu(Tensor& total, const Tensor& values_any, int64_t isa) {
  const Tensor values = torch::stable::contiguous(values_any);
  STD_TORCH_CHECK(total.is_contiguous() && total.scalar_type() == ScalarType::Float && total.numel() == values.numel(),
                  "accumulate takes a contiguous fp32 total and as many values");
  const auto& kernels = ML_KERNELS(accumulate, isa);
  const ml::Format format = ml::format_of(values);
  float* total_data = static_cast<float*>(total.mutable_data_ptr());
  const void* values_data = values.const_data_ptr();
  torch::stable::parallel_for(0, total.numel(), ml::kCpuNumbersPerTask, [&](int64_t begin, int64_t end) {
    kernels.add(format, total_data, values_data, begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_lite_cpu, m) {
  m.def("accumulate(Tensor(a!) total, Tensor values, int isa=-1) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_lite_cpu, CPU, m) {
  m.impl("accumulate", TORCH_BOX(&accumulate_cpu));
}
