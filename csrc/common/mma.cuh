// Tensor cores of sm_80 and newer: one warp multiplies 16x16 by 16x8 matrices of bf16 or fp16 and adds in fp32. What
// feeds them: matrices from shared memory into registers (ldmatrix), and copies from global into shared memory that run
// beside the arithmetic (cp.async).
//
// Which number lies in which lane's register is fixed by the PTX ISA ("Matrix Fragments for mma.m16n8k16 with
// floating point type" and "ldmatrix"). With group = lane / 4, pair = 2 * (lane % 4), and two numbers to a register:
//   A[16, 16]: a[0..1] = A[group and group + 8, pair..], a[2..3] = A[group and group + 8, pair + 8..]
//   B[16, 8]:  b[0] = B[pair.., group], b[1] = B[pair + 8.., group]
//   C[16, 8]:  c[0..1] = C[group, pair..], c[2..3] = C[group + 8, pair..], fp32
//   ldmatrix:  lane 8 i + j names row j of matrix i; r[i] = matrix_i[group, pair..], transposed matrix_i[pair.., group]
#pragma once

#include "common/cuda.cuh"

#ifdef ML_EMULATED
#include "mma_emulation.h"
#endif

namespace ml {

#ifndef ML_EMULATED

using SharedAddress = uint32_t;

__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}

// Starts a copy of kBytes (4 or 16) into shared memory; zeros arrive where `exists` is false, and nothing is read.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool exists) {
  const int bytes = exists ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(bytes));
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(bytes));
  }
}

// Closes the group of the copies that this thread started since the last call.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;"); }

// Waits until at most the last kPending of this thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices; `row` is where the 16 bytes are that this lane names.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// c += a b
template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void multiply_add<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                            uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_add<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 2^x, to 2 units in the last place; results below 2^-126 are 0.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#endif

// Two numbers in one register, `low` in its lower half.
template <class T>
__device__ __forceinline__ uint32_t pack_two(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_two<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &two, sizeof bits);
  return bits;
}
template <>
__device__ __forceinline__ uint32_t pack_two<__half>(float low, float high) {
  const __half2 two = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &two, sizeof bits);
  return bits;
}

}  // namespace ml
