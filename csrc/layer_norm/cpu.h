// LayerNorm on the CPU: what binding_cpu.cpp calls, for each instruction set of this build.
#pragma once

#include "common/norm.h"

namespace ml {

extern const NormCpu layer_norm_portable, layer_norm_avx2, layer_norm_avx512, layer_norm_avx512bf16;

}  // namespace ml
