// RMSNorm on the CPU with AVX512-BF16, which rounds to bf16 in one instruction: see common/norm_rows.h.

#include "rms_norm/cpu.h"

#include "common/norm_rows.h"

namespace ml {
extern const NormCpu ML_FOR_ISA(rms_norm) = {arrange, forward<false>, backward<false>, sum_parts};
}
