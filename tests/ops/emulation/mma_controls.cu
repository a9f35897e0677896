// Kernels for test_mma_emulation.py: products and copies that are right, and a copy that is not waited for.

#include "common/mma.cuh"

namespace {

// out[32, 8] is a[16, 16] b[16, 8] twice: b read as it lies, and from its transpose.
template <class T>
__global__ void product(const T* a, const T* b, const T* b_transposed, float* out) {
  T* const shared = ml::dynamic_shared<T>();  // a; b in rows of 8; b transposed, in rows of 16
  const int lane = threadIdx.x;
  ml::copy_async<16>(shared + lane * 8, a + lane * 8, true);
  ml::copy_async<16>(shared + 256 + lane % 16 * 8, b + lane % 16 * 8, true);
  ml::copy_async<16>(shared + 384 + lane % 16 * 8, b_transposed + lane % 16 * 8, true);
  ml::copy_async_commit();
  ml::copy_async_wait<0>();
  __syncthreads();
  uint32_t fragments[4], rows[4], columns[4];
  ml::load_matrices(fragments, ml::shared_address(shared + lane % 16 * 16 + lane / 16 * 8));
  ml::load_matrices_transposed(rows, ml::shared_address(shared + 256 + lane % 16 * 8));
  ml::load_matrices(columns, ml::shared_address(shared + 384 + lane % 8 * 16 + lane / 8 % 2 * 8));
  float sums[2][4] = {};
  ml::multiply_add<T>(sums[0], fragments, rows[0], rows[1]);
  ml::multiply_add<T>(sums[1], fragments, columns[0], columns[1]);
  for (int i = 0; i < 8; ++i)
    out[(i / 4 * 16 + lane / 4 + i / 2 % 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i / 4][i % 4];
}

// out[0..31] and out[32..63] are two copied groups, read when kPending may still be under way.
template <int kPending>
__global__ void two_groups(const float* in, float* out) {
  float* const shared = ml::dynamic_shared<float>();
  for (int group = 0; group < 2; ++group) {
    const int i = group * 32 + threadIdx.x;
    ml::copy_async<4>(shared + i, in + i, i != 40);
    ml::copy_async_commit();
  }
  ml::copy_async_wait<kPending>();
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
  out[32 + threadIdx.x] = shared[32 + threadIdx.x];
  ml::copy_async_wait<0>();
}

}  // namespace

#define ML_EXPORT extern "C" __attribute__((visibility("default"))) int

ML_EXPORT control_product_bf16(const void* a, const void* b, const void* b_transposed, float* out) {
  using T = __nv_bfloat16;
  return ml::launch(product<T>, 1, 32, 1024, nullptr, static_cast<const T*>(a), static_cast<const T*>(b),
                    static_cast<const T*>(b_transposed), out);
}
ML_EXPORT control_product_fp16(const void* a, const void* b, const void* b_transposed, float* out) {
  using T = __half;
  return ml::launch(product<T>, 1, 32, 1024, nullptr, static_cast<const T*>(a), static_cast<const T*>(b),
                    static_cast<const T*>(b_transposed), out);
}
ML_EXPORT control_all_arrived(const float* in, float* out) {
  return ml::launch(two_groups<0>, 1, 32, 256, nullptr, in, out);
}
ML_EXPORT control_one_arrived(const float* in, float* out) {
  return ml::launch(two_groups<1>, 1, 32, 256, nullptr, in, out);
}
