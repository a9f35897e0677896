// GELU on the CPU: what binding_cpu.cpp calls.
#pragma once

#include "common/activation.h"
#include "common/format.h"

namespace ml {

struct GeluCpu {
  // Numbers begin..end of out = a(x), for the activations kGelu and kGeluErf.
  void (*forward)(Format format, Activation activation, const void* x, void* out, int64_t begin, int64_t end);
  // Numbers begin..end of d_x = d_out a'(x).
  void (*backward)(Format format, Activation activation, const void* d_out, const void* x, void* d_x, int64_t begin,
                   int64_t end);
};

extern const GeluCpu gelu_portable, gelu_avx2, gelu_avx512, gelu_avx512bf16;

}  // namespace ml
