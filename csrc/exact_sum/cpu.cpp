// Adds float64 numbers as integers (a Kulisch accumulator), so that nothing is rounded and the order cannot matter.

#include "exact_sum/cpu.h"

#include "common/vec.h"

namespace {

constexpr int kMantissaBits = 52;

ML_INLINE void add_one(uint64_t bits, int64_t* limbs) {
  const int64_t biased = (bits >> kMantissaBits) & 0x7ff;
  const uint64_t fraction = bits & ((uint64_t{1} << kMantissaBits) - 1);
  if (biased == 0x7ff) {  // infinity or NaN
    ++limbs[ml::kExactLength - 1];
    return;
  }
  if (biased == 0 && fraction == 0) return;
  // The value is integer * 2^exponent with 2^52 <= |integer| < 2^53, also where it is subnormal.
  uint64_t magnitude = biased == 0 ? fraction : fraction | uint64_t{1} << kMantissaBits;
  const int shift = __builtin_clzll(magnitude) - (63 - kMantissaBits);
  magnitude <<= shift;
  const int64_t exponent = (biased == 0 ? 1 : biased) - 1075 - shift;
  const int64_t integer = bits >> 63 ? -static_cast<int64_t>(magnitude) : static_cast<int64_t>(magnitude);
  // Two halves of the mantissa: 27 bits shifted by up to 31 fit into an int64.
  const int64_t parts[2] = {integer & ((int64_t{1} << 27) - 1), integer >> 27};
  for (int part = 0; part < 2; ++part) {
    const int64_t bit = exponent + ml::kLowestBit + 27 * part;
    const int64_t shifted = parts[part] * (int64_t{1} << (bit % 32));
    limbs[bit / 32] += shifted & 0xffffffff;
    limbs[bit / 32 + 1] += shifted >> 32;
  }
}

void add(const double* values, int64_t* limbs, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    uint64_t bits;
    __builtin_memcpy(&bits, values + i, sizeof(bits));
    add_one(bits, limbs);
  }
}

}  // namespace

namespace ml {
extern const ExactSumCpu ML_FOR_ISA(exact_sum) = {add};
}
