// Sums of squares over blocks of 256 numbers, in fp64, by one fixed tree of additions: halves are added until one
// number is left. The square of a number in fp32 or less is exact in fp64, so every instruction set gives the same
// bits.

#include "block_squares/cpu.h"

#include "common/vec.h"

namespace {

// As many doubles as one register of the instruction set holds.
#if defined(__AVX512F__)
constexpr int kDoubles = 8;
#elif defined(__AVX2__)
constexpr int kDoubles = 4;
#else
constexpr int kDoubles = 2;
#endif
typedef double Doubles __attribute__((vector_size(kDoubles * sizeof(double))));
typedef float Floats __attribute__((vector_size(kDoubles * sizeof(float))));

constexpr int kHalf = ml::kSquaresPerBlock / 2;
constexpr int kVectors = kHalf / kDoubles;  // of a block's halves, once these are added

ML_INLINE Doubles squares(const float* x) {
  Floats narrow;
  __builtin_memcpy(&narrow, x, sizeof(narrow));
  const Doubles wide = __builtin_convertvector(narrow, Doubles);
  return wide * wide;
}

// The tree depth first, so that few registers are in use: vectors `at`, `at + stride`, ... of the block.
template <int stride>
ML_INLINE Doubles sum_from(const float* x, int at) {
  if constexpr (stride == kVectors)
    return squares(x + at * kDoubles) + squares(x + kHalf + at * kDoubles);
  else
    return sum_from<2 * stride>(x, at) + sum_from<2 * stride>(x, at + stride);
}

ML_INLINE double sum_of_block(const float* x) {
  const Doubles total = sum_from<1>(x, 0);
  double part[kDoubles];
  __builtin_memcpy(part, &total, sizeof(part));
  for (int width = kDoubles / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  return part[0];
}

template <class T>
void sum_all(const void* values, double* sums, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const auto* source = static_cast<const typename T::Stored*>(values) + block * ml::kSquaresPerBlock;
    float widened[ml::kSquaresPerBlock];
    for (int64_t i = 0; i < ml::kSquaresPerBlock; i += kLanes) Fp32::store(widened + i, T::load(source + i));
    sums[block] = sum_of_block(widened);
  }
}

void sum(ml::Format format, const void* values, double* sums, int64_t begin, int64_t end) {
  switch (format) {
    case ml::Format::kFp32:
      for (int64_t block = begin; block < end; ++block)
        sums[block] = sum_of_block(static_cast<const float*>(values) + block * ml::kSquaresPerBlock);
      return;
    case ml::Format::kBf16: return sum_all<Bf16>(values, sums, begin, end);
    case ml::Format::kFp16: return sum_all<Fp16>(values, sums, begin, end);
  }
}

}  // namespace

namespace ml {
extern const BlockSquaresCpu ML_FOR_ISA(block_squares) = {sum};
}
