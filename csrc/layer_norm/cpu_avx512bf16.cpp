// LayerNorm on the CPU with AVX512-BF16, which rounds to bf16 in one instruction: see common/norm_rows.h.

#include "layer_norm/cpu.h"

#include "common/norm_rows.h"

namespace ml {
extern const NormCpu ML_FOR_ISA(layer_norm) = {arrange, forward<true>, backward<true>, sum_parts};
}
