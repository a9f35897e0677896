// What an AdamW update reads, writes and is told, on every device. Plain C types.
//
// With g = factor * gradient and one rounding to fp32 after each operation (no fused multiply-add, so that every
// implementation gives the same bits):
//
//   first   = (mean_weight > 0 ? first : g) + mean_weight (g - first)      mean_weight: 1 - beta1, or -beta1
//   second  = square_keep second + square_weight (g g)
//   weight  = (weight - decay weight) - (step_size first) / (sqrt(second) + eps)
//
// The mean moves from the end that it lies nearer to. step_size and eps hold the bias corrections: see
// megatron_lite/ops/adamw.py.
#pragma once

#include <stdint.h>

#include "common/format.h"

namespace ml {

struct AdamWMemory {
  float *weights, *first, *second;
  const void* gradients;
  void* parameters;  // null: nothing to write
  Format gradient_format, parameter_format;
};

struct AdamWCoefficients {
  float factor, mean_weight, square_keep, square_weight, step_size, eps;
};

}  // namespace ml
