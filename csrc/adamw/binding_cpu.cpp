// AdamW on the CPU, as an operator on tensors.

#include "adamw/cpu.h"
#include "adamw/tensors.h"
#include "common/instruction_set.h"

using ml::Tensor;

namespace {

constexpr int64_t kNumbersPerItem = 512;  // threads begin at multiples of it, so on whole cache lines

void adamw_cpu(const Tensor& weights, const Tensor& first, const Tensor& second, const Tensor& gradients,
               const std::optional<Tensor>& parameters, const std::vector<int64_t>& undecayed, double factor,
               double mean_weight, double square_keep, double square_weight, double step_size, double eps, double decay,
               int64_t isa) {
  const auto memory = ml::adamw_memory(weights, first, second, gradients, parameters);
  const auto coefficients =
      ml::adamw_coefficients(factor, mean_weight, square_keep, square_weight, step_size, eps);
  const int64_t size = weights.numel();
  const auto runs = ml::adamw_runs(size, undecayed, decay);
  const auto& kernels = ML_KERNELS(adamw, isa);
  const int64_t items = (size + kNumbersPerItem - 1) / kNumbersPerItem;
  torch::stable::parallel_for(0, items, ml::grain(kNumbersPerItem), [&](int64_t begin, int64_t end) {
    for (const ml::AdamWRun& run : runs) {
      const int64_t from = std::max(run.begin, begin * kNumbersPerItem);
      const int64_t to = std::min(run.end, end * kNumbersPerItem);
      if (from < to) kernels.update(memory, coefficients, run.decay, from, to);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_lite_cpu, m) {
  m.def(
      "adamw(Tensor(a!) weights, Tensor(b!) first, Tensor(c!) second, Tensor gradients, Tensor(d!)? parameters, "
      "int[] undecayed, float factor, float mean_weight, float square_keep, float square_weight, float step_size, "
      "float eps, float decay, int isa=-1) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_lite_cpu, CPU, m) {
  m.impl("adamw", TORCH_BOX(&adamw_cpu));
}
