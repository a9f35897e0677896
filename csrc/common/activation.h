// The activations of the feed-forward block, by number: ACTIVATIONS in megatron_lite/ops/swiglu.py is in this order.
#pragma once

#include <stdint.h>

namespace ml {

enum class Activation : int { kSilu, kGelu, kRelu, kGeluErf };
constexpr int kNumActivations = 4;

}  // namespace ml
