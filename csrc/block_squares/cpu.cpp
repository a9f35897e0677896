// Sums of squares of fp32 numbers over blocks of 256, in fp64, by one fixed tree of additions: halves are added until
// one number is left. The square of an fp32 number is exact in fp64, so every instruction set gives the same bits.

#include "block_squares/cpu.h"

#include "common/vec.h"

namespace {

void sum(const float* values, double* sums, int64_t begin, int64_t end) {
  constexpr int64_t kHalf = ml::kSquaresPerBlock / 2;
  for (int64_t block = begin; block < end; ++block) {
    const float* x = values + block * ml::kSquaresPerBlock;
    double part[kHalf];
    for (int64_t i = 0; i < kHalf; ++i) {
      const double low = x[i], high = x[i + kHalf];
      part[i] = low * low + high * high;
    }
    for (int64_t width = kHalf / 2; width > 0; width /= 2)
      for (int64_t i = 0; i < width; ++i) part[i] += part[i + width];
    sums[block] = part[0];
  }
}

}  // namespace

namespace ml {
extern const BlockSquaresCpu ML_FOR_ISA(block_squares) = {sum};
}
