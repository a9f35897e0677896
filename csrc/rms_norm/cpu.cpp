// RMSNorm on the CPU, forward and backward. Arithmetic is fp32 whatever the storage format. A row's result depends on
// nothing but the row, and a block's part of the weight's gradient on nothing but the block.
//
//   forward    y = x r w              with r = 1 / sqrt(mean(x^2) + eps), one number a row
//   backward   dx = r (g - n mean(g n))   with n = x r (computed again, not stored) and g = dy w
//              dw = sum over rows of dy n

#include "rms_norm/cpu.h"

#include "common/vec.h"

namespace {

// Four running sums hide the latency of an addition and shorten each chain of roundings.
template <class T>
ML_INLINE float sum_of_squares(const typename T::Stored* x, int64_t dim) {
  f32x16 sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= dim; i += 4 * kLanes) {
    for (int k = 0; k < 4; ++k) {
      const f32x16 v = T::load(x + i + k * kLanes);
      sum[k] += v * v;
    }
  }
  for (; i < dim; i += kLanes) {
    const f32x16 v = i + kLanes <= dim ? T::load(x + i) : T::load(x + i, dim - i);
    sum[0] += v * v;
  }
  return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <class T>
void forward_rows(const void* x_all, const float* weight, void* y_all, float* rstd, int64_t begin, int64_t end,
                  int64_t dim, float eps) {
  using Stored = typename T::Stored;
  for (int64_t row = begin; row < end; ++row) {
    const Stored* x = static_cast<const Stored*>(x_all) + row * dim;
    Stored* y = static_cast<Stored*>(y_all) + row * dim;
    const float r = 1.0f / __builtin_sqrtf(sum_of_squares<T>(x, dim) / static_cast<float>(dim) + eps);
    rstd[row] = r;
    int64_t i = 0;
    for (; i + kLanes <= dim; i += kLanes) T::store(y + i, T::load(x + i) * splat(r) * Fp32::load(weight + i));
    if (i < dim) T::store(y + i, T::load(x + i, dim - i) * splat(r) * Fp32::load(weight + i, dim - i), dim - i);
  }
}

// mean(g n) / r of a row: the sum of dy w x over dim.
template <class T>
ML_INLINE float mean_of_products(const typename T::Stored* dy, const typename T::Stored* x, const float* weight,
                                 int64_t dim) {
  f32x16 sum[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= dim; i += 2 * kLanes)
    for (int k = 0; k < 2; ++k) {
      const int64_t j = i + k * kLanes;
      sum[k] += T::load(dy + j) * Fp32::load(weight + j) * T::load(x + j);
    }
  for (; i < dim; i += kLanes) {
    const int64_t count = i + kLanes <= dim ? kLanes : dim - i;
    sum[0] += T::load(dy + i, count) * Fp32::load(weight + i, count) * T::load(x + i, count);
  }
  return sum_lanes(sum[0] + sum[1]) / static_cast<float>(dim);
}

template <class T>
ML_INLINE void backward_lanes(const typename T::Stored* dy, const typename T::Stored* x, const float* weight, float r,
                              float mean, typename T::Stored* dx, float* weight_part, int64_t count) {
  const f32x16 n = T::load(x, count) * splat(r);
  const f32x16 dy_lanes = T::load(dy, count);
  const f32x16 g = dy_lanes * Fp32::load(weight, count);
  T::store(dx, (g - n * splat(mean)) * splat(r), count);
  Fp32::store(weight_part, Fp32::load(weight_part, count) + dy_lanes * n, count);
}

template <class T>
void backward_rows(const void* dy_all, const void* x_all, const float* weight, const float* rstd, void* dx_all,
                   float* weight_part, int64_t begin, int64_t end, int64_t dim) {
  using Stored = typename T::Stored;
  __builtin_memset(weight_part, 0, dim * sizeof(float));
  for (int64_t row = begin; row < end; ++row) {
    const Stored* dy = static_cast<const Stored*>(dy_all) + row * dim;
    const Stored* x = static_cast<const Stored*>(x_all) + row * dim;
    Stored* dx = static_cast<Stored*>(dx_all) + row * dim;
    const float r = rstd[row];
    const float mean = mean_of_products<T>(dy, x, weight, dim) * r;
    int64_t i = 0;
    for (; i + kLanes <= dim; i += kLanes)
      backward_lanes<T>(dy + i, x + i, weight + i, r, mean, dx + i, weight_part + i, kLanes);
    if (i < dim) backward_lanes<T>(dy + i, x + i, weight + i, r, mean, dx + i, weight_part + i, dim - i);
  }
}

void forward(ml::Format format, const void* x, const float* weight, void* y, float* rstd, int64_t begin, int64_t end,
             int64_t dim, float eps) {
  switch (format) {
    case ml::Format::kFp32: return forward_rows<Fp32>(x, weight, y, rstd, begin, end, dim, eps);
    case ml::Format::kBf16: return forward_rows<Bf16>(x, weight, y, rstd, begin, end, dim, eps);
    case ml::Format::kFp16: return forward_rows<Fp16>(x, weight, y, rstd, begin, end, dim, eps);
  }
}

void backward(ml::Format format, const void* dy, const void* x, const float* weight, const float* rstd, void* dx,
              float* weight_part, int64_t begin, int64_t end, int64_t dim) {
  switch (format) {
    case ml::Format::kFp32: return backward_rows<Fp32>(dy, x, weight, rstd, dx, weight_part, begin, end, dim);
    case ml::Format::kBf16: return backward_rows<Bf16>(dy, x, weight, rstd, dx, weight_part, begin, end, dim);
    case ml::Format::kFp16: return backward_rows<Fp16>(dy, x, weight, rstd, dx, weight_part, begin, end, dim);
  }
}

// Walks the blocks in the outer loop, so that memory is read in order; 256 sums at a time stay in the L1 cache.
void sum_parts(const float* weight_parts, float* dweight, int64_t num_blocks, int64_t begin, int64_t end, int64_t dim) {
  constexpr int64_t kTile = 256;
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t width = end - tile < kTile ? end - tile : kTile;
    double sum[kTile] = {};
    for (int64_t block = 0; block < num_blocks; ++block)
      for (int64_t i = 0; i < width; ++i) sum[i] += weight_parts[block * dim + tile + i];
    for (int64_t i = 0; i < width; ++i) dweight[tile + i] = static_cast<float>(sum[i]);
  }
}

}  // namespace

namespace ml {
extern const RmsNormCpu ML_FOR_ISA(rms_norm) = {forward, backward, sum_parts};
}
