// RMSNorm on the CPU: see common/norm_rows.h.

#include "rms_norm/cpu.h"

#include "common/norm_rows.h"

namespace ml {
extern const NormCpu ML_FOR_ISA(rms_norm) = {arrange, forward<false>, backward<false>, sum_parts};
}
