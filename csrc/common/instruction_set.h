// Which of an op's tables of functions, one for each instruction set, runs on this CPU.
#pragma once

#include <stdint.h>

#include <algorithm>

namespace ml {

// The best instruction set that this CPU and this build have: 0 portable, 1 AVX2, 2 AVX-512, 3 AVX-512 with bf16
// products. Tests lower the choice by `requested`; -1 is the best.
inline int64_t instruction_set(int64_t requested) {
  int64_t best = 0;
#ifdef ML_WITH_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = 1;
#endif
#ifdef ML_WITH_AVX512
  if (best == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    best = 2;
#endif
#ifdef ML_WITH_AVX512BF16
  if (best == 2 && __builtin_cpu_supports("avx512bf16")) best = 3;
#endif
  return requested < 0 ? best : std::min(best, requested);
}

}  // namespace ml

// setup.py builds each set on the one before (ML_WITH_<SET>): without AVX2 there is no AVX-512.
#if defined(ML_WITH_AVX512)
#define ML_KERNELS(op, isa)                                                     \
  (ml::instruction_set(isa) >= 2 ? ml::op##_avx512                              \
                                 : ml::instruction_set(isa) == 1 ? ml::op##_avx2 : ml::op##_portable)
#elif defined(ML_WITH_AVX2)
#define ML_KERNELS(op, isa) (ml::instruction_set(isa) >= 1 ? ml::op##_avx2 : ml::op##_portable)
#else
#define ML_KERNELS(op, isa) ((void)ml::instruction_set(isa), ml::op##_portable)
#endif

// The same for an op that has a cpu_avx512bf16.cpp.
#ifdef ML_WITH_AVX512BF16
#define ML_KERNELS_WITH_BF16(op, isa) (ml::instruction_set(isa) >= 3 ? ml::op##_avx512bf16 : ML_KERNELS(op, isa))
#else
#define ML_KERNELS_WITH_BF16(op, isa) ML_KERNELS(op, isa)
#endif
