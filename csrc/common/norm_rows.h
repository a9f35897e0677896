// RMSNorm and LayerNorm on the CPU, forward and backward, with and without an addition before them. Only the files
// rms_norm/cpu*.cpp and layer_norm/cpu*.cpp include this; see vec.h for the rules of such files.
//
//   forward    y = n w + b   with n = (v - m) r,  m = mean(v),  r = 1 / sqrt(mean((v - m)^2) + eps),  v = x + residual
//   backward   dv = r (g - mean(g) - n mean(g n)) + dsum   with g = dy w; n is computed again, not stored
//              dw = sum over rows of dy n,  db = sum over rows of dy
//
// RMSNorm is the same with m = 0, mean(g) = 0 and b = 0. A row's result depends on nothing but the row, and a block's
// part of the gradients of weight and bias on nothing but the block.
//
// A row is read from memory once: it is short enough for the L1 or L2 cache, from which the later passes take it. The
// results are written in the last pass, past the caches where they are too large to stay in them.
#pragma once

#include "common/norm.h"
#include "common/vec.h"

#ifdef __AVX512BF16__
#include <immintrin.h>  // its functions are always inlined
#endif

namespace {

using ml::kNormChunk;

#define ML_INLINED __attribute__((always_inline))

// kNormChunk numbers. Elementwise arithmetic does not care which number is in which lane, so each format chooses what
// loads and stores cheapest: bf16 has the numbers of even index in one vector and those of odd index in the other. The
// last chunk of a row, if it is not full, is in plain order.
struct Chunk {
  f32x16 a, b;
};

ML_INLINE Chunk operator+(Chunk x, Chunk y) { return {x.a + y.a, x.b + y.b}; }
ML_INLINE Chunk operator-(Chunk x, Chunk y) { return {x.a - y.a, x.b - y.b}; }
ML_INLINE Chunk operator*(Chunk x, Chunk y) { return {x.a * y.a, x.b * y.b}; }
ML_INLINE Chunk both(float value) { return {splat(value), splat(value)}; }
ML_INLINE Chunk load_arranged(const float* source) { return {Fp32::load(source), Fp32::load(source + kLanes)}; }
ML_INLINE void store_arranged(float* target, Chunk chunk) {
  Fp32::store(target, chunk.a);
  Fp32::store(target + kLanes, chunk.b);
}

template <class T>
constexpr bool kAlternates = false;
template <>
constexpr bool kAlternates<Bf16> = true;

ML_INLINE Chunk unpack_bf16(u32x16 pairs) { return {(f32x16)(pairs << 16), (f32x16)(pairs & 0xffff0000u)}; }

// What is not worth a copy at each place where it is used: it would be most of the code.
#define ML_APART __attribute__((noinline))

template <class T>
ML_APART Chunk load_tail(const typename T::Stored* source, int64_t count) {
  return {T::load(source, count < kLanes ? count : kLanes),
          count > kLanes ? T::load(source + kLanes, count - kLanes) : f32x16{}};
}

ML_APART Chunk load_fp16(const uint16_t* source) { return {Fp16::load(source), Fp16::load(source + kLanes)}; }

template <class T>
ML_INLINE Chunk load_chunk(const typename T::Stored* source, int64_t count) {
  if (count < kNormChunk) return load_tail<T>(source, count);
  if constexpr (kAlternates<T>) {
    u32x16 pairs;
    __builtin_memcpy(&pairs, source, sizeof(pairs));
    return unpack_bf16(pairs);
  } else if constexpr (sizeof(*source) == sizeof(float)) {
    return load_arranged(source);
  } else {
    return load_fp16(source);
  }
}

// bf16 in the upper half of each lane, to nearest, ties to even; the lower half is to be ignored.
ML_INLINE u32x16 round_to_bf16(f32x16 lanes) {
  const u32x16 bits = (u32x16)lanes;
  return lanes != lanes ? u32x16{} + 0x7fc00000u : bits + 0x7fffu + ((bits >> 16) & 1u);
}

// A full chunk as 64 or 128 bytes.
template <class T>
struct Packed {
  f32x16 lines[sizeof(typename T::Stored) * kNormChunk / 64];
};

ML_APART Packed<Fp16> pack_fp16(Chunk chunk) {
  Packed<Fp16> packed;
  Fp16::store((uint16_t*)&packed, chunk.a);
  Fp16::store((uint16_t*)&packed + kLanes, chunk.b);
  return packed;
}

template <class T>
ML_INLINE Packed<T> pack(Chunk chunk) {
  if constexpr (kAlternates<T>) {
#ifdef __AVX512BF16__  // the same rounding, but numbers below 2^-126 become zero
    typedef uint16_t u16x32 __attribute__((vector_size(64)));
    const __m512i order = (__m512i)(u16x32){0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                            8,  24, 9,  25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)chunk.b, (__m512)chunk.a);
    return {{(f32x16)_mm512_maskz_permutexvar_epi16(0xffffffffu, order, halves)}};
#else
    return {{(f32x16)((round_to_bf16(chunk.a) >> 16) | (round_to_bf16(chunk.b) & 0xffff0000u))}};
#endif
  } else if constexpr (sizeof(typename T::Stored) == sizeof(float)) {
    return {{chunk.a, chunk.b}};
  } else {
    return pack_fp16(chunk);
  }
}

template <class T>
ML_APART void store_tail(typename T::Stored* target, Chunk chunk, int64_t count) {
  T::store(target, chunk.a, count < kLanes ? count : kLanes);
  if (count > kLanes) T::store(target + kLanes, chunk.b, count - kLanes);
}

// Writes a line without reading it first, where the compiler can say so; `target` lies on a line's boundary.
ML_INLINE void store_past_caches(f32x16* target, f32x16 line) {
#if defined(__clang__)
  __builtin_nontemporal_store(line, target);
#elif defined(__AVX512F__)
  __builtin_ia32_movntps512((float*)target, line);
#elif defined(__AVX__)
  typedef float f32x8 __attribute__((vector_size(32)));
  f32x8 halves[2];
  __builtin_memcpy(halves, &line, sizeof(line));
  __builtin_ia32_movntps256((float*)target, halves[0]);
  __builtin_ia32_movntps256((float*)target + 8, halves[1]);
#else
  *target = line;
#endif
}

// Makes what store_past_caches wrote visible to the other threads.
ML_INLINE void end_stores_past_caches() {
#ifdef __SSE__
  __builtin_ia32_sfence();
#endif
}

template <class T>
ML_INLINE void store_chunk(typename T::Stored* target, Chunk chunk, int64_t count, bool streams) {
  if (count < kNormChunk) return store_tail<T>(target, chunk, count);
  const Packed<T> packed = pack<T>(chunk);
  if (!streams) return (void)__builtin_memcpy(target, &packed, sizeof(packed));
  for (unsigned i = 0; i < sizeof(packed) / 64; ++i) store_past_caches((f32x16*)target + i, packed.lines[i]);
}

// `chunk` as it comes back from the storage format.
template <class T>
ML_INLINE Chunk rounded(Chunk chunk) {
  if constexpr (sizeof(typename T::Stored) == sizeof(float)) {
    return chunk;
  } else if constexpr (kAlternates<T>) {
    return unpack_bf16((u32x16)pack<T>(chunk).lines[0]);
  } else {
    const Packed<T> packed = pack<T>(chunk);
    return load_chunk<T>((const typename T::Stored*)&packed, kNormChunk);
  }
}

// The input of the norm: x, or x + residual as it is stored.
template <class T, bool kAdds>
ML_INLINE Chunk load_input(const typename T::Stored* x, const typename T::Stored* residual, int64_t i, int64_t count) {
  const Chunk chunk = load_chunk<T>(x + i, count);
  if constexpr (!kAdds) return chunk;
  else return rounded<T>(chunk + load_chunk<T>(residual + i, count));
}

// Calls step(first index, number of indices) for the chunks of a row.
template <class Step>
ML_INLINE void for_chunks(int64_t dim, Step step) {
  int64_t i = 0;
  for (; i + kNormChunk <= dim; i += kNormChunk) step(i, kNormChunk);
  if (i < dim) step(i, dim - i);
}

ML_INLINE f32x16 first_lanes(f32x16 lanes, int64_t count) {
  f32x16 kept{};
  if (count > 0) __builtin_memcpy(&kept, &lanes, (count < kLanes ? count : kLanes) * sizeof(float));
  return kept;
}

// Sum over the row of (v - mean)^2, or of v itself. Four running sums hide the latency of an addition and shorten each
// chain of roundings.
template <class T, bool kAdds, bool kSquares>
ML_INLINE float sum_row(const typename T::Stored* x, const typename T::Stored* residual, float mean, int64_t dim) {
  Chunk sum[2] = {};
  int64_t i = 0;
  const auto add = [&](Chunk& total, Chunk v) ML_INLINED {
    if constexpr (kSquares) total = total + v * v;
    else total = total + v;
  };
  for (; i + 2 * kNormChunk <= dim; i += 2 * kNormChunk) {
    add(sum[0], load_input<T, kAdds>(x, residual, i, kNormChunk) - both(mean));
    add(sum[1], load_input<T, kAdds>(x, residual, i + kNormChunk, kNormChunk) - both(mean));
  }
  if (i + kNormChunk <= dim) {
    add(sum[0], load_input<T, kAdds>(x, residual, i, kNormChunk) - both(mean));
    i += kNormChunk;
  }
  if (i < dim) {
    const Chunk v = load_input<T, kAdds>(x, residual, i, dim - i) - both(mean);
    add(sum[1], {first_lanes(v.a, dim - i), first_lanes(v.b, dim - i - kLanes)});
  }
  const Chunk total = sum[0] + sum[1];
  return sum_lanes(total.a + total.b);
}

template <class T, bool kCentred, bool kAdds>
void forward_rows(const ml::NormForward& args, int64_t begin, int64_t end) {
  using Stored = typename T::Stored;
  const int64_t dim = args.dim;
  const bool streams = args.streams;
  const float size = static_cast<float>(dim), *weight = args.weight, *bias = args.bias;
  for (int64_t row = begin; row < end; ++row) {
    const Stored* x = static_cast<const Stored*>(args.x) + row * dim;
    const Stored* residual = kAdds ? static_cast<const Stored*>(args.residual) + row * dim : nullptr;
    Stored* sum = kAdds ? static_cast<Stored*>(args.sum) + row * dim : nullptr;
    Stored* y = static_cast<Stored*>(args.y) + row * dim;
    const float mean = kCentred ? sum_row<T, kAdds, false>(x, residual, 0.0f, dim) / size : 0.0f;
    const float r = 1.0f / __builtin_sqrtf(sum_row<T, kAdds, true>(x, residual, mean, dim) / size + args.eps);
    if constexpr (kCentred) args.mean[row] = mean;
    args.rstd[row] = r;
    for_chunks(dim, [&](int64_t i, int64_t count) ML_INLINED {
      const Chunk v = load_input<T, kAdds>(x, residual, i, count);
      Chunk out = (v - both(mean)) * both(r) * load_arranged(weight + i);
      if constexpr (kCentred) out = out + load_arranged(bias + i);
      if constexpr (kAdds) store_chunk<T>(sum + i, v, count, streams);
      store_chunk<T>(y + i, out, count, streams);
    });
  }
  if (args.streams) end_stores_past_caches();
}

// kRows rows from `row` on; the loads and stores of the weight and of the two parts serve all of them.
template <class T, bool kCentred, bool kAdds, int kRows>
ML_INLINE void backward_group(const ml::NormBackward& args, float* weight_part, float* bias_part, int64_t row) {
  using Stored = typename T::Stored;
  const int64_t dim = args.dim;
  const bool streams = args.streams;
  const float size = static_cast<float>(dim), *weight = args.weight;
  const Stored* dy = static_cast<const Stored*>(args.dy) + row * dim;
  const Stored* dsum = kAdds ? static_cast<const Stored*>(args.dsum) + row * dim : nullptr;
  const Stored* input = static_cast<const Stored*>(args.input) + row * dim;
  Stored* dx = static_cast<Stored*>(args.dx) + row * dim;
  float r[kRows], shift[kRows];  // n = (v + shift) r
  for (int k = 0; k < kRows; ++k) {
    r[k] = args.rstd[row + k];
    shift[k] = kCentred ? -args.mean[row + k] : 0.0f;
  }
  const auto centred = [&](int k, int64_t i, int64_t count) ML_INLINED {
    const Chunk v = load_chunk<T>(input + k * dim + i, count);
    if constexpr (kCentred) return v + both(shift[k]);
    else return v;
  };
  Chunk sum_g[kRows] = {}, sum_gn[kRows] = {};
  for_chunks(dim, [&](int64_t i, int64_t count) ML_INLINED {
    const Chunk w = load_arranged(weight + i);
    Chunk dweight = load_arranged(weight_part + i), dbias{};
    if constexpr (kCentred) dbias = load_arranged(bias_part + i);
#pragma GCC unroll 4
    for (int k = 0; k < kRows; ++k) {
      const Chunk n = centred(k, i, count) * both(r[k]), up = load_chunk<T>(dy + k * dim + i, count), g = up * w;
      sum_gn[k] = sum_gn[k] + g * n;
      dweight = dweight + up * n;
      if constexpr (kCentred) {
        sum_g[k] = sum_g[k] + g;
        dbias = dbias + up;
      }
    }
    store_arranged(weight_part + i, dweight);
    if constexpr (kCentred) store_arranged(bias_part + i, dbias);
  });

  float slope[kRows], offset[kRows];  // r (g - mean(g) - n mean(g n)) = g r - (v + shift) slope - offset
  for (int k = 0; k < kRows; ++k) {
    slope[k] = sum_lanes(sum_gn[k].a + sum_gn[k].b) / size * r[k] * r[k];
    offset[k] = kCentred ? sum_lanes(sum_g[k].a + sum_g[k].b) / size * r[k] : 0.0f;
  }
  for_chunks(dim, [&](int64_t i, int64_t count) ML_INLINED {
    const Chunk w = load_arranged(weight + i);
    // All rows are loaded before any is stored: where dim is a multiple of a page, the addresses of the rows differ in
    // their upper bits alone, and a load behind such a store waits for it.
    Chunk out[kRows];
#pragma GCC unroll 4
    for (int k = 0; k < kRows; ++k) {
      out[k] = load_chunk<T>(dy + k * dim + i, count) * w * both(r[k]) - centred(k, i, count) * both(slope[k]);
      if constexpr (kCentred) out[k] = out[k] - both(offset[k]);
      if constexpr (kAdds) out[k] = out[k] + load_chunk<T>(dsum + k * dim + i, count);
    }
#pragma GCC unroll 4
    for (int k = 0; k < kRows; ++k) store_chunk<T>(dx + k * dim + i, out[k], count, streams);
  });
}

template <class T, bool kCentred, bool kAdds>
void backward_rows(const ml::NormBackward& args, float* weight_part, float* bias_part, int64_t begin, int64_t end) {
#if defined(__AVX512F__)  // as many rows as there are registers for
  constexpr int kGroup = 4;
#elif defined(__AVX__)
  constexpr int kGroup = 2;
#else
  constexpr int kGroup = 1;
#endif
  const uint64_t part_bytes = ml::norm_padded(args.dim) * sizeof(float);
  __builtin_memset(weight_part, 0, part_bytes);
  if constexpr (kCentred) __builtin_memset(bias_part, 0, part_bytes);
  int64_t row = begin;
  for (; row + kGroup <= end; row += kGroup)
    backward_group<T, kCentred, kAdds, kGroup>(args, weight_part, bias_part, row);
  for (; row < end; ++row) backward_group<T, kCentred, kAdds, 1>(args, weight_part, bias_part, row);
  if (args.streams) end_stores_past_caches();
}

// Index in a row of a full chunk's lane: `lane` counts through both vectors.
template <class T>
ML_INLINE int64_t index_of_lane(int64_t lane) {
  return kAlternates<T> ? lane % kLanes * 2 + lane / kLanes : lane;
}

template <class T>
void arrange_in(const float* plain, float* arranged, int64_t dim) {
  for_chunks(dim, [&](int64_t i, int64_t count) ML_INLINED {
    for (int64_t lane = 0; lane < kNormChunk; ++lane) {
      const int64_t index = count == kNormChunk ? index_of_lane<T>(lane) : lane;
      arranged[i + lane] = index < count ? plain[i + index] : 0.0f;
    }
  });
}

// Walks the blocks in the outer loop, so that memory is read in order; the sums of 8 chunks stay in the L1 cache.
template <class T>
void sum_parts_in(const float* parts, float* total, int64_t num_blocks, int64_t dim, int64_t begin, int64_t end) {
  constexpr int64_t kTile = 8;
  const int64_t padded = ml::norm_padded(dim);
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t start = first * kNormChunk, width = (end - first < kTile ? end - first : kTile) * kNormChunk;
    double sum[kTile * kNormChunk] = {};
    for (int64_t block = 0; block < num_blocks; ++block)
      for (int64_t i = 0; i < width; ++i) sum[i] += parts[block * padded + start + i];
    for (int64_t i = 0; i < width; ++i) {
      const int64_t chunk = start + i / kNormChunk * kNormChunk, lane = i % kNormChunk;
      const int64_t column = chunk + (chunk + kNormChunk <= dim ? index_of_lane<T>(lane) : lane);
      if (column < dim) total[column] = static_cast<float>(sum[i]);
    }
  }
}

// Calls `call` with the format as a type.
template <class Call>
ML_INLINE void with_format(ml::Format format, Call call) {
  switch (format) {
    case ml::Format::kFp32: return call(Fp32{});
    case ml::Format::kBf16: return call(Bf16{});
    case ml::Format::kFp16: return call(Fp16{});
  }
}

void arrange(ml::Format format, const float* plain, float* arranged, int64_t dim) {
  with_format(format, [&](auto t) { arrange_in<decltype(t)>(plain, arranged, dim); });
}

template <bool kCentred>
void forward(ml::Format format, const ml::NormForward& args, int64_t begin, int64_t end) {
  with_format(format, [&](auto t) {
    args.residual != nullptr ? forward_rows<decltype(t), kCentred, true>(args, begin, end)
                             : forward_rows<decltype(t), kCentred, false>(args, begin, end);
  });
}

template <bool kCentred>
void backward(ml::Format format, const ml::NormBackward& args, float* weight_part, float* bias_part, int64_t begin,
              int64_t end) {
  with_format(format, [&](auto t) {
    args.dsum != nullptr ? backward_rows<decltype(t), kCentred, true>(args, weight_part, bias_part, begin, end)
                         : backward_rows<decltype(t), kCentred, false>(args, weight_part, bias_part, begin, end);
  });
}

void sum_parts(ml::Format format, const float* parts, float* total, int64_t num_blocks, int64_t dim, int64_t begin,
               int64_t end) {
  with_format(format, [&](auto t) { sum_parts_in<decltype(t)>(parts, total, num_blocks, dim, begin, end); });
}

}  // namespace
