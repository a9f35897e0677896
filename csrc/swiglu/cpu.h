// Gated activations on the CPU: what binding_cpu.cpp calls.
#pragma once

#include "common/activation.h"
#include "common/format.h"

namespace ml {

struct SwigluCpu {
  // Rows begin..end of out[rows, half] = a(gate) up, where gate_up[rows, 2 half] holds gate and up side by side.
  void (*forward)(Format format, Activation activation, const void* gate_up, void* out, int64_t begin, int64_t end,
                  int64_t half);
  // Rows begin..end of the gradient d_gate_up[rows, 2 half].
  void (*backward)(Format format, Activation activation, const void* d_out, const void* gate_up, void* d_gate_up,
                   int64_t begin, int64_t end, int64_t half);
};

extern const SwigluCpu swiglu_portable, swiglu_avx2, swiglu_avx512, swiglu_avx512bf16;

}  // namespace ml
