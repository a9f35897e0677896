// The exact sum of float64 numbers on the CPU: what binding_cpu.cpp calls.
#pragma once

#include <stdint.h>

namespace ml {

// As in megatron_lite/utils/exact.py: 32-bit limbs, the weight of bit 0 is 2^-kLowestBit; the last entry counts what is
// not finite.
constexpr int64_t kLowestBit = 1126;
constexpr int64_t kExactLength = (1024 + kLowestBit) / 32 + 4;

struct ExactSumCpu {
  // Adds values[begin..end] to limbs[kExactLength].
  void (*add)(const double* values, int64_t* limbs, int64_t begin, int64_t end);
};

extern const ExactSumCpu exact_sum_portable, exact_sum_avx2, exact_sum_avx512;

}  // namespace ml
