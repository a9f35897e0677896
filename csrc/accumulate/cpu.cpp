// total += values in one pass, where torch would first write the values out again in fp32.

#include "accumulate/cpu.h"

#include "common/vec.h"

namespace {

template <class T>
void add_all(float* total, const void* values, int64_t begin, int64_t end) {
  const typename T::Stored* source = static_cast<const typename T::Stored*>(values);
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) Fp32::store(total + i, Fp32::load(total + i) + T::load(source + i));
  if (i < end) Fp32::store(total + i, Fp32::load(total + i, end - i) + T::load(source + i, end - i), end - i);
}

void add(ml::Format format, float* total, const void* values, int64_t begin, int64_t end) {
  switch (format) {
    case ml::Format::kFp32: return add_all<Fp32>(total, values, begin, end);
    case ml::Format::kBf16: return add_all<Bf16>(total, values, begin, end);
    case ml::Format::kFp16: return add_all<Fp16>(total, values, begin, end);
  }
}

}  // namespace

namespace ml {
extern const AccumulateCpu ML_FOR_ISA(accumulate) = {add};
}
