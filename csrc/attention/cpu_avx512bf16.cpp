// Flash attention on the CPU with products of bf16 pairs (AVX512-BF16): an instruction multiplies 32 pairs of numbers
// and adds each two neighbours to an fp32 sum. Weights and gradients of scores are rounded to bf16 for their products.

#include <immintrin.h>

#include "attention/cpu_table.h"

namespace {

ML_INLINE __m512bh as_pairs(f32x16 words) { return (__m512bh)words; }

struct PairWords {
  static constexpr int64_t kUnit = 2;
  static constexpr int64_t kChain = INT64_MAX;  // bf16's own rounding is far larger than a sum's

  static ML_INLINE f32x16 multiply_add(f32x16 sum, f32x16 a, f32x16 b) {
    return (f32x16)_mm512_dpbf16_ps((__m512)sum, as_pairs(a), as_pairs(b));
  }

  static ML_INLINE u16x16 load_numbers(const uint16_t* source, int64_t count) {
    u16x16 packed{};
    if (count >= kLanes)
      __builtin_memcpy(&packed, source, sizeof(packed));
    else if (count > 0)
      __builtin_memcpy(&packed, source, count * sizeof(uint16_t));
    return packed;
  }

  static ML_INLINE u32x16 load_wide(const uint16_t* row, int64_t first, int64_t dim) {
    return row == nullptr ? u32x16{} : __builtin_convertvector(load_numbers(row + first, dim - first), u32x16);
  }

  template <class T>
  static ML_INLINE void pack_row(const uint16_t* source, int64_t dim, float* words, int64_t num_words) {
    uint16_t* numbers = reinterpret_cast<uint16_t*>(words);
    for (int64_t i = 0; i < 2 * num_words; i += kLanes) {
      const u16x16 packed = load_numbers(source + i, dim - i);
      __builtin_memcpy(numbers + i, &packed, sizeof(packed));
    }
  }

  template <class T>
  static ML_INLINE void pack_depth(const uint16_t* const* rows, int64_t first, int64_t dim, float* words,
                                   int64_t width) {
    for (int64_t i = 0; i < width; i += kLanes)
      Fp32::store(words + i, (f32x16)(load_wide(rows[0], first + i, dim) | load_wide(rows[1], first + i, dim) << 16));
  }

  // Two vectors of neighbours in a row become one of words.
  static ML_INLINE const float* pack_weights(const float* rows, float* words, int64_t stride, int64_t begin,
                                             int64_t end) {
    for (int64_t r = 0; r < kRows; ++r)
      for (int64_t i = begin / 32 * 32; i < end; i += 32) {
        const f32x16 low = Fp32::load(rows + r * stride + i);
        const f32x16 high = Fp32::load(rows + r * stride + i + kLanes);
        Fp32::store(words + (r * stride + i) / 2, (f32x16)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
      }
    return words;
  }

  // Two rows become one of words.
  static ML_INLINE void pack_transposed(const float* rows, int64_t stride, float* words, int64_t words_stride,
                                        int64_t begin, int64_t end) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int64_t r = 0; r < kRows; r += 2)
      for (int64_t i = begin; i < end; i += kLanes) {
        const f32x16 low = Fp32::load(rows + r * stride + i), high = Fp32::load(rows + (r + 1) * stride + i);
        const __m512i pairs = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
        Fp32::store(words + r / 2 * words_stride + i, (f32x16)_mm512_permutexvar_epi16(order, pairs));
      }
  }
};

}  // namespace

namespace ml {
extern const AttentionCpu attention_avx512bf16 = Table<PairWords, Bf16>::functions;
}
