// The small matrix products that flash attention is made of, and the layouts that they read.
//
// Every product is C[rows, columns] (+)= A B with kRows rows at a time: accumulators stay in registers, a word of A is
// broadcast, a panel of B is read one row after the other. A word is what one instruction multiplies in a lane: an fp32
// number (Fp32Words), or a pair of bf16 numbers that follow each other along the dimension that is summed over
// (PairWords, in cpu_avx512bf16.cpp). Words are held as floats, whatever they are.
//
//   rows     A: [row][words of dim]                            q, d_out
//   columns  B, summed over dim: panels of kPanel rows, [panel][word of dim][row]       k, v
//   depth    B, summed over rows: panels of up to kPanel of dim, [panel][word of rows][dim]   all of them
#pragma once

#include "attention/cpu.h"
#include "common/vec.h"

namespace {

#if defined(__AVX512F__)
constexpr int64_t kRows = 6, kMaxVectors = 4;  // 24 accumulators, 4 of B and a broadcast in 32 registers
#elif defined(__AVX2__)
constexpr int64_t kRows = 6, kMaxVectors = 1;  // 12 accumulators, 2 of B and a broadcast in 16 registers
#else
constexpr int64_t kRows = 2, kMaxVectors = 1;
#endif
constexpr int64_t kPanel = kMaxVectors * kLanes;
constexpr float kLog2E = 1.44269504f;

ML_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
ML_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
ML_INLINE int64_t up_to(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// `value` in every lane, bit by bit: a word that holds two numbers is no float that may be calculated with.
ML_INLINE f32x16 broadcast(float value) {
  return f32x16{value, value, value, value, value, value, value, value,
                value, value, value, value, value, value, value, value};
}

ML_INLINE float largest_lane(f32x16 v) {
  v = larger(v, ML_SHUFFLED(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = larger(v, ML_SHUFFLED(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  v = larger(v, ML_SHUFFLED(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  v = larger(v, ML_SHUFFLED(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
  return v[0];
}

// 2^x for x below 127; below -126 it stays at 2^-126. NaN stays NaN. The polynomial is that of Cephes' exp2f. One
// multiplication and a reduction less than `exp`: the factor log2(e) is in the scale of the scores.
ML_INLINE f32x16 exp2(f32x16 x) {
  x = larger(splat(-126.0f), x);
  const f32x16 shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which lands in the low bits
  const f32x16 shifted = x + shift;
  const f32x16 r = x - (shifted - shift);
  f32x16 p = splat(1.535336188e-4f);
  p = p * r + splat(1.339887440e-3f);
  p = p * r + splat(9.618437357e-3f);
  p = p * r + splat(5.550332471e-2f);
  p = p * r + splat(2.402264791e-1f);
  p = p * r + splat(6.931472028e-1f);
  p = p * r + splat(1.0f);
  return (f32x16)((u32x16)p + ((u32x16)shifted << 23));
}

// Lanes first..last-1 of `lanes`, and of `others` elsewhere.
ML_INLINE f32x16 lanes_between(f32x16 lanes, int64_t first, int64_t last, f32x16 others) {
  const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const i32x16 inside = (lane >= static_cast<int32_t>(first)) & (lane < static_cast<int32_t>(last));
  return inside ? lanes : others;
}

// Up to 16 numbers from `source` on, of which `count` are there. A copy of a size that the compiler knows is one
// instruction, any other a call or a loop.
template <class T>
ML_INLINE f32x16 load_up_to(const typename T::Stored* source, int64_t count) {
  return count >= kLanes ? T::load(source) : count > 0 ? T::load(source, count) : f32x16{};
}

template <class T>
ML_INLINE void store_up_to(typename T::Stored* target, f32x16 lanes, int64_t count) {
  if (count >= kLanes)
    T::store(target, lanes);
  else
    T::store(target, lanes, count);
}

ML_INLINE void zero(float* target, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kLanes) Fp32::store(target + i, f32x16{});
}

struct Fp32Words {
  static constexpr int64_t kUnit = 1;
  // Of products over the head dimension. A sum's error grows with the number of its terms; that of scores ends up in
  // all results, and those of d_out v and d_out out, which nearly cancel, in dq and dk.
  static constexpr int64_t kChain = 32;
  static ML_INLINE f32x16 multiply_add(f32x16 sum, f32x16 a, f32x16 b) { return sum + a * b; }
  template <class T>
  static ML_INLINE void pack_row(const typename T::Stored* source, int64_t dim, float* words, int64_t num_words) {
    for (int64_t i = 0; i < num_words; i += kLanes)
      Fp32::store(words + i, load_up_to<T>(source + i, dim - i));
  }
  // Words of the dimension that runs over rows, from one row of numbers (rows: kUnit of them, null beyond the last).
  template <class T>
  static ML_INLINE void pack_depth(const typename T::Stored* const* rows, int64_t first, int64_t dim, float* words,
                                   int64_t width) {
    for (int64_t i = 0; i < width; i += kLanes)
      Fp32::store(words + i, rows[0] == nullptr ? f32x16{} : load_up_to<T>(rows[0] + first + i, dim - first - i));
  }
  // kRows rows of weights as A summed over keys, begin..end-1 of them, multiples of 16. May return what it was given.
  static ML_INLINE const float* pack_weights(const float* rows, float*, int64_t, int64_t, int64_t) { return rows; }
  // kRows rows as A summed over these rows (kTransposed): rows / kUnit of words, one for each key.
  static ML_INLINE void pack_transposed(const float* rows, int64_t stride, float* words, int64_t words_stride,
                                        int64_t begin, int64_t end) {
    for (int64_t r = 0; r < kRows; ++r)
      for (int64_t i = begin; i < end; i += kLanes)
        Fp32::store(words + r * words_stride + i, Fp32::load(rows + r * stride + i));
  }
};

// What a product adds to: nothing, C, C times a factor for each row; or to C at last, when it is summed up itself.
enum class Start { kZero, kSum, kScaledSum, kAddedLast };

template <class W, int kVectors, bool kTransposed, Start kStart>
ML_INLINE void product_of(const float* a, int64_t a_stride, const float* b, int64_t steps, float* c, int64_t c_stride,
                          const float* factors) {
  f32x16 sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int64_t r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < kVectors; ++n) {
      constexpr bool kFromZero = kStart == Start::kZero || kStart == Start::kAddedLast;
      sums[r][n] = kFromZero ? f32x16{} : Fp32::load(c + r * c_stride + n * kLanes);
      if (kStart == Start::kScaledSum) sums[r][n] *= broadcast(factors[r]);
    }
  for (int64_t k = 0; k < steps; ++k) {
    f32x16 panel[kVectors];
#pragma GCC unroll 8
    for (int n = 0; n < kVectors; ++n) panel[n] = Fp32::load(b + (k * kVectors + n) * kLanes);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
      const f32x16 word = broadcast(kTransposed ? a[k * a_stride + r] : a[r * a_stride + k]);
#pragma GCC unroll 8
      for (int n = 0; n < kVectors; ++n) sums[r][n] = W::multiply_add(sums[r][n], word, panel[n]);
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < kVectors; ++n) {
      float* to = c + r * c_stride + n * kLanes;
      Fp32::store(to, kStart == Start::kAddedLast ? Fp32::load(to) + sums[r][n] : sums[r][n]);
    }
}

// C[kRows, width] = start + A[kRows, steps] B[steps, width], in words. A is a[row * a_stride + step], or
// a[step * a_stride + row] when kTransposed; b is a panel of `width`, a multiple of 16 up to kPanel.
template <class W, bool kTransposed, Start kStart>
__attribute__((noinline)) void product(const float* a, int64_t a_stride, const float* b, int64_t steps, float* c,
                                       int64_t c_stride, int64_t width, const float* factors = nullptr) {
  if (width == kPanel)
    return product_of<W, kMaxVectors, kTransposed, kStart>(a, a_stride, b, steps, c, c_stride, factors);
  if constexpr (kMaxVectors == 4) {
    switch (width / kLanes) {
      case 1: return product_of<W, 1, kTransposed, kStart>(a, a_stride, b, steps, c, c_stride, factors);
      case 2: return product_of<W, 2, kTransposed, kStart>(a, a_stride, b, steps, c, c_stride, factors);
      default: return product_of<W, 3, kTransposed, kStart>(a, a_stride, b, steps, c, c_stride, factors);
    }
  }
}

// C[kRows, kPanel] = A B over `steps` words of the head dimension, no more than W::kChain of them in one sum.
template <class W>
ML_INLINE void dim_product(const float* a, int64_t a_stride, const float* b, int64_t steps, float* c,
                           int64_t c_stride) {
  product<W, false, Start::kZero>(a, a_stride, b, min_of(steps, W::kChain), c, c_stride, kPanel);
  for (int64_t step = W::kChain; step < steps; step += W::kChain)
    product<W, false, Start::kAddedLast>(a + step, a_stride, b + step * kPanel, min_of(steps - step, W::kChain), c,
                                         c_stride, kPanel);
}

// Sizes of a problem in words W and storage T.
template <class W>
struct Sizes {
  int64_t dim, padded_dim, row_words;  // numbers; numbers as whole vectors; words of a row
  explicit Sizes(const ml::AttentionProblem& p)
      : dim(p.dim), padded_dim(up_to(p.dim, kLanes)), row_words(up_to((p.dim + W::kUnit - 1) / W::kUnit, kLanes)) {}
};

template <class T>
ML_INLINE const typename T::Stored* row_of(const ml::AttentionTensor& tensor, int64_t batch, int64_t token,
                                           int64_t head) {
  return static_cast<const typename T::Stored*>(tensor.data) + batch * tensor.batch_stride +
         token * tensor.token_stride + head * tensor.head_stride;
}

// Tokens first..first+count-1 of a head in layout `rows`, and zeros up to `padded` rows.
template <class W, class T>
void pack_rows(const Sizes<W>& sizes, const ml::AttentionTensor& tensor, int64_t batch, int64_t head, int64_t first,
               int64_t count, int64_t padded, float* words) {
  for (int64_t i = 0; i < padded; ++i)
    W::template pack_row<T>(row_of<T>(tensor, batch, first + min_of(i, count - 1), head), i < count ? sizes.dim : 0,
                            words + i * sizes.row_words, sizes.row_words);
}

// Tokens first..first+kPanel-1 of the `count` of a head as a panel of layout `columns`, zeros beyond the last.
// `scratch` holds kPanel rows.
template <class W, class T>
void pack_panel(const Sizes<W>& sizes, const ml::AttentionTensor& tensor, int64_t batch, int64_t head, int64_t first,
                int64_t count, float* panel, float* scratch) {
  const int64_t steps = (sizes.dim + W::kUnit - 1) / W::kUnit;
  if (first >= count) return zero(panel, 0, kPanel * steps);
  pack_rows<W, T>(sizes, tensor, batch, head, first, min_of(kPanel, count - first), kPanel, scratch);
  for (int64_t step = 0; step < steps; ++step)
    for (int64_t i = 0; i < kPanel; ++i) panel[step * kPanel + i] = scratch[i * sizes.row_words + step];
}

// All `count` tokens of a head in layout `columns`, and zeros up to `padded` of them, a multiple of kPanel.
template <class W, class T>
void pack_columns(const Sizes<W>& sizes, const ml::AttentionTensor& tensor, int64_t batch, int64_t head, int64_t count,
                  int64_t padded, float* words, float* scratch) {
  const int64_t steps = (sizes.dim + W::kUnit - 1) / W::kUnit;
  for (int64_t first = 0; first < padded; first += kPanel)
    pack_panel<W, T>(sizes, tensor, batch, head, first, count, words + first * steps, scratch);
}

// All `count` tokens of a head in layout `depth`, and zeros up to `padded` of them, a multiple of kUnit.
template <class W, class T>
void pack_depth(const Sizes<W>& sizes, const ml::AttentionTensor& tensor, int64_t batch, int64_t head, int64_t count,
                int64_t padded, float* words) {
  const int64_t steps = padded / W::kUnit;
  for (int64_t step = 0; step < steps; ++step) {
    const typename T::Stored* rows[W::kUnit];
    for (int64_t u = 0; u < W::kUnit; ++u) {
      const int64_t token = step * W::kUnit + u;
      rows[u] = token < count ? row_of<T>(tensor, batch, token, head) : nullptr;
    }
    for (int64_t first = 0; first < sizes.padded_dim; first += kPanel) {
      const int64_t width = min_of(kPanel, sizes.padded_dim - first);
      W::template pack_depth<T>(rows, first, sizes.dim, words + first * steps + step * width, width);
    }
  }
}

// C[kRows, padded_dim] = start + A B, with B the steps begin..end-1 of a layout `depth` of `total` steps.
template <class W, bool kTransposed, Start kStart>
ML_INLINE void depth_product(const Sizes<W>& sizes, const float* a, int64_t a_stride, const float* depth, int64_t total,
                             int64_t begin, int64_t end, float* c, const float* factors = nullptr) {
  for (int64_t first = 0; first < sizes.padded_dim; first += kPanel) {
    const int64_t width = min_of(kPanel, sizes.padded_dim - first);
    product<W, kTransposed, kStart>(a, a_stride, depth + first * total + begin * width, end - begin, c + first,
                                    sizes.padded_dim, width, factors);
  }
}

// Keys first..last-1; none when first >= last.
struct Range {
  int64_t first, last;
  ML_INLINE bool empty() const { return first >= last; }
};

// The keys that query i sees.
ML_INLINE Range range_of(const ml::AttentionProblem& p, int64_t batch, int64_t i) {
  const int64_t position = p.num_keys - p.num_queries + i;
  Range range{0, p.num_keys};
  if (p.bounds != nullptr) {
    const int32_t* bounds = p.bounds + (batch * p.num_queries + i) * 2;
    range = {max_of(0, bounds[0]), min_of(p.num_keys, bounds[1])};
  }
  if (p.causal) range.last = min_of(range.last, position + 1);
  if (p.window > 0) range.first = max_of(range.first, position - p.window + 1);
  return range.empty() ? Range{0, 0} : range;
}

// The smallest range that holds those of `count` queries, cut to the keys first..first+size-1 and counted from `first`.
ML_INLINE Range hull_of(const Range* ranges, int64_t count, int64_t first, int64_t size) {
  Range hull{size, 0};
  for (int64_t i = 0; i < count; ++i) {
    const Range own{max_of(ranges[i].first - first, 0), min_of(ranges[i].last - first, size)};
    if (!own.empty()) hull = {min_of(hull.first, own.first), max_of(hull.last, own.last)};
  }
  return hull;
}

// scores[i] = scale scores[i] - slope |position - key| for the vectors of keys begin..end-1.
ML_INLINE void add_slope(float* scores, int64_t begin, int64_t end, int64_t first_key, int64_t position, float scale,
                         float slope) {
  const f32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int64_t i = begin; i < end; i += kLanes) {
    const f32x16 behind = splat(static_cast<float>(position - first_key - i)) - lane;
    const f32x16 distance = larger(behind, -behind);
    Fp32::store(scores + i, Fp32::load(scores + i) * broadcast(scale) - distance * broadcast(slope));
  }
}

}  // namespace
