// AdamW's arguments as the bindings get them: what is checked before a pointer is taken.
#pragma once

#include <optional>

#include "adamw/update.h"
#include "common/tensors.h"

namespace ml {

// Elements begin..end, with this much decay.
struct AdamWRun {
  int64_t begin, end;
  float decay;
};

inline AdamWMemory adamw_memory(const Tensor& weights, const Tensor& first, const Tensor& second,
                                const Tensor& gradients, const std::optional<Tensor>& parameters) {
  const int64_t size = weights.numel();
  for (const Tensor* flat : {&weights, &first, &second})
    STD_TORCH_CHECK(flat->dim() == 1 && flat->is_contiguous() && flat->numel() == size &&
                        flat->scalar_type() == ScalarType::Float && flat->device() == weights.device(),
                    "adamw takes weights, first and second as contiguous fp32 vectors of one length on one device");
  for (const Tensor* flat : {&gradients, parameters ? &*parameters : &gradients})
    STD_TORCH_CHECK(flat->dim() == 1 && flat->is_contiguous() && flat->numel() == size &&
                        flat->device() == weights.device(),
                    "adamw takes gradients and parameters as contiguous vectors of the weights' length and device");
  return {static_cast<float*>(weights.mutable_data_ptr()),
          static_cast<float*>(first.mutable_data_ptr()),
          static_cast<float*>(second.mutable_data_ptr()),
          gradients.const_data_ptr(),
          parameters ? parameters->mutable_data_ptr() : nullptr,
          format_of(gradients),
          parameters ? format_of(*parameters) : Format::kFp32};
}

// undecayed: begin, end, begin, end, ... in order. Everything else decays.
inline std::vector<AdamWRun> adamw_runs(int64_t size, const std::vector<int64_t>& undecayed, double decay) {
  STD_TORCH_CHECK(undecayed.size() % 2 == 0, "adamw takes undecayed as pairs of begin and end");
  std::vector<AdamWRun> runs;
  int64_t at = 0;
  for (size_t i = 0; i < undecayed.size(); i += 2) {
    const int64_t begin = undecayed[i], end = undecayed[i + 1];
    STD_TORCH_CHECK(at <= begin && begin <= end && end <= size, "adamw takes undecayed pairs in order, inside weights");
    runs.push_back({at, begin, static_cast<float>(decay)});
    runs.push_back({begin, end, 0.0f});
    at = end;
  }
  runs.push_back({at, size, static_cast<float>(decay)});
  return runs;
}

inline AdamWCoefficients adamw_coefficients(double factor, double mean_weight, double square_keep, double square_weight,
                                            double step_size, double eps) {
  return {static_cast<float>(factor),        static_cast<float>(mean_weight), static_cast<float>(square_keep),
          static_cast<float>(square_weight), static_cast<float>(step_size),   static_cast<float>(eps)};
}

}  // namespace ml
