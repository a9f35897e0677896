// Rotary position embedding on the CPU: what binding_cpu.cpp calls.
#pragma once

#include "common/format.h"
#include "rotary/shape.h"

namespace ml {

struct RotaryCpu {
  // Tokens begin..end, counted over batch and tokens, of q and of k.
  void (*rotate)(Format format, const RotaryShape& shape, const RotaryHeads& q, const RotaryHeads& k, const float* cos,
                 const float* sin, int64_t begin, int64_t end);
};

extern const RotaryCpu rotary_portable, rotary_avx2, rotary_avx512, rotary_avx512bf16;

}  // namespace ml
