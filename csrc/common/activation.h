// The activations, by number: ACTIVATIONS in megatron_lite/ops/activation_kernels.py is in this order.
#pragma once

#include <stdint.h>

namespace ml {

enum class Activation : int { kSilu, kGelu, kRelu, kGeluErf };
constexpr int kNumActivations = 4;

}  // namespace ml
