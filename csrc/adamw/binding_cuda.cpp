// AdamW on CUDA, as an operator on tensors.

#include "adamw/cuda.h"
#include "adamw/tensors.h"
#include "common/cuda_error.h"

using ml::Tensor;

namespace {

// `stream` is the cudaStream_t as an integer: reading the current stream takes torch 2.13's ABI, or CUDA headers.
void adamw_cuda(const Tensor& weights, const Tensor& first, const Tensor& second, const Tensor& gradients,
                const std::optional<Tensor>& parameters, const std::vector<int64_t>& undecayed, double factor,
                double mean_weight, double square_keep, double square_weight, double step_size, double eps,
                double decay, int64_t stream) {
  const auto memory = ml::adamw_memory(weights, first, second, gradients, parameters);
  const auto coefficients =
      ml::adamw_coefficients(factor, mean_weight, square_keep, square_weight, step_size, eps);
  for (const ml::AdamWRun& run : ml::adamw_runs(weights.numel(), undecayed, decay))
    ml::check_cuda("adamw", ml::adamw_cuda(memory, coefficients, run.decay, run.begin, run.end,
                                           reinterpret_cast<void*>(stream)));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_lite_cuda, m) {
  m.def(
      "adamw(Tensor(a!) weights, Tensor(b!) first, Tensor(c!) second, Tensor gradients, Tensor(d!)? parameters, "
      "int[] undecayed, float factor, float mean_weight, float square_keep, float square_weight, float step_size, "
      "float eps, float decay, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_lite_cuda, ML_CUDA_KEY, m) {
  m.impl("adamw", TORCH_BOX(&adamw_cuda));
}
