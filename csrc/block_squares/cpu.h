// Sums of squares over blocks on the CPU: what binding_cpu.cpp calls.
#pragma once

#include "common/format.h"

namespace ml {

constexpr int64_t kSquaresPerBlock = 256;

struct BlockSquaresCpu {
  // sums[b] = sum over block b of values^2, for blocks begin..end; values as `format` stores them.
  void (*sum)(Format format, const void* values, double* sums, int64_t begin, int64_t end);
};

extern const BlockSquaresCpu block_squares_portable, block_squares_avx2, block_squares_avx512;

}  // namespace ml
