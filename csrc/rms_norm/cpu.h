// RMSNorm on the CPU: what binding_cpu.cpp calls, for each instruction set of this build.
#pragma once

#include "common/norm.h"

namespace ml {

extern const NormCpu rms_norm_portable, rms_norm_avx2, rms_norm_avx512, rms_norm_avx512bf16;

}  // namespace ml
