// What the attention kernels share: which keys a query sees, tiles in shared memory, products of tiles on tensor cores.
//
// A query sees one interval of keys: the causal mask, the window and the bounds each cut it at an end. A tile of
// queries therefore has an interval that one of them sees, outside of which nothing is computed, and one that all of
// them see, inside of which no mask is tested.
#pragma once

#include <type_traits>

#include "attention/cuda.h"
#include "common/mma.cuh"

namespace ml::attention {

using Problem = CudaAttentionProblem;
using Heads = CudaHeads;
using Gradients = CudaAttentionGradients;

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int kNoKey = 0x7fffffff;

struct Interval {
  int first, end;
};

// The keys that a set of queries sees: one of them [first, end), all of them [all_first, all_end).
struct alignas(16) Span {
  int first, end, all_first, all_end;

  __device__ __forceinline__ bool touches(int key, int keys) const { return key < end && first < key + keys; }
  __device__ __forceinline__ bool covers(int key, int keys) const { return all_first <= key && key + keys <= all_end; }
};

__device__ __forceinline__ Interval visible(const Problem& p, int batch, int query) {
  const int position = p.keys - p.queries + query;
  Interval keys = {0, p.keys};
  if (p.causal) keys.end = min(keys.end, position + 1);
  if (p.window > 0) keys.first = max(keys.first, position - p.window + 1);
  if (p.bounds != nullptr) {
    const int32_t* bounds = p.bounds + (int64_t(batch) * p.queries + query) * 2;
    keys.first = max(keys.first, bounds[0]);
    keys.end = min(keys.end, bounds[1]);
  }
  return keys;
}

__device__ __forceinline__ Span join(const Span& a, const Span& b) {
  return {min(a.first, b.first), max(a.end, b.end), max(a.all_first, b.all_first), min(a.all_end, b.all_end)};
}

// The span of queries [first, first + count), of which at least one exists.
__device__ __forceinline__ Span span_of(const Problem& p, int batch, int first, int count) {
  const int end = min(first + count, p.queries);
  if (p.bounds == nullptr) {  // both ends of the interval grow with the query
    const Interval low = visible(p, batch, first), high = visible(p, batch, end - 1);
    return {low.first, high.end, high.first, low.end};
  }
  const int spans_of_row = (p.queries + kCudaAttentionSpan - 1) / kCudaAttentionSpan;
  const Span* spans = reinterpret_cast<const Span*>(p.spans) + int64_t(batch) * spans_of_row;
  Span all = spans[first / kCudaAttentionSpan];
  for (int i = first / kCudaAttentionSpan + 1; i * kCudaAttentionSpan < end; ++i) all = join(all, spans[i]);
  return all;
}

// kRows rows of kDim numbers in shared memory, in chunks of 16 bytes. A row's chunks are permuted such that the same
// chunk of eight rows, which is what ldmatrix reads at once, lies in all 32 banks.
template <class T, int kRows_, int kDim>
struct Tile {
  static constexpr int kRows = kRows_, kChunks = kDim / 8, kSize = kRows * kDim;
  T* numbers;

  static __device__ __forceinline__ int turn(int row) { return kDim % 64 == 0 ? row & 7 : row >> 1 & 3; }

  __device__ __forceinline__ T* chunk(int row, int chunk) const {
    return numbers + (row * kChunks + (chunk ^ turn(row))) * 8;
  }
};

// Where a lane reads a tile's matrices from: its row of the first matrix, and the chunks 0, 2, 4, 6 of it, each plus
// `odd`. All others lie a constant further, so that their addresses cost no registers.
template <int kDim>
struct Reader {
  static constexpr int kTurned = kDim % 64 == 0 ? 8 : 4;
  SharedAddress chunks[kTurned / 2];

  template <class T, int kRows>
  __device__ __forceinline__ Reader(const Tile<T, kRows, kDim>& tile, int row, int odd) {
#pragma unroll
    for (int i = 0; i < kTurned / 2; ++i)
      chunks[i] = shared_address(tile.numbers) + row * kDim * 2 + ((2 * i + odd) ^ tile.turn(row)) * 16;
  }

  // `rows`, a multiple of 16, below the lane's row.
  __device__ __forceinline__ SharedAddress at(int rows, int even) const {
    return chunks[even % kTurned / 2] + rows * kDim * 2 + even / kTurned * kTurned * 16;
  }
};

// For the 16 rows from `row` as A, for a tile's rows as the columns of B, and for a tile's columns as those.
template <class T, int kRows, int kDim>
__device__ __forceinline__ Reader<kDim> a_reader(const Tile<T, kRows, kDim>& tile, int row) {
  return {tile, row + int(threadIdx.x) % 16, int(threadIdx.x) / 16 % 2};
}
template <class T, int kRows, int kDim>
__device__ __forceinline__ Reader<kDim> b_reader(const Tile<T, kRows, kDim>& tile) {
  return {tile, int(threadIdx.x) / 16 % 2 * 8 + int(threadIdx.x) % 8, int(threadIdx.x) / 8 % 2};
}
template <class T, int kRows, int kDim>
__device__ __forceinline__ Reader<kDim> b_reader_transposed(const Tile<T, kRows, kDim>& tile) {
  return a_reader(tile, 0);
}

// One head's rows in global memory. `by_chunks`: every row starts on 16 bytes and is a multiple of them.
template <class T>
struct Rows {
  T* numbers;
  int64_t stride;
  int count, dim;
  bool by_chunks;
};

template <class T>
__device__ __forceinline__ Rows<const T> rows_of(const Heads& heads, int batch, int head, int count, int dim,
                                                 bool by_chunks) {
  const T* numbers = static_cast<const T*>(heads.data) + batch * heads.batch + head * heads.head;
  return {numbers, heads.token, count, dim, by_chunks};
}

// Starts the copies of rows [first, first + Tile::kRows) into the tile; what does not exist is zero. A thread takes the
// same columns of every kStep-th row, where the permutation of the chunks is the same too.
template <int kThreads, class T, int kRows, int kDim>
__device__ __forceinline__ void load(const Tile<T, kRows, kDim>& tile, const Rows<const T>& rows, int first) {
  constexpr int kColumns = kDim % 64 == 0 ? 8 : 4, kStep = kThreads / kColumns;
  static_assert(kStep % 8 == 0 && kRows % kStep == 0);
  const int row = first + threadIdx.x / kColumns;
#pragma unroll
  for (int chunk = threadIdx.x % kColumns; chunk < kDim / 8; chunk += kColumns) {
    T* to = tile.chunk(threadIdx.x / kColumns, chunk);
    const T* from = rows.numbers + row * rows.stride + chunk * 8;
    if (rows.by_chunks) {
#pragma unroll
      for (int i = 0; i < kRows; i += kStep, to += kStep * kDim, from += kStep * rows.stride) {
        const bool exists = row + i < rows.count && chunk * 8 < rows.dim;
        copy_async<16>(to, exists ? from : rows.numbers, exists);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kRows; i += kStep, to += kStep * kDim, from += kStep * rows.stride) {
#pragma unroll 1
        for (int e = 0; e < 8; ++e)
          to[e] = row + i < rows.count && chunk * 8 + e < rows.dim ? from[e] : from_float<T>(0.0f);
      }
    }
  }
}

// Starts the copies of kCount numbers that belong to rows; what does not exist is zero.
template <int kCount>
__device__ __forceinline__ void load_numbers(float* to, const float* from, int first, int count) {
  static_assert(kCount <= 128, "one number a thread");
  if (threadIdx.x < kCount) {
    const bool exists = first + static_cast<int>(threadIdx.x) < count;
    copy_async<4>(to + threadIdx.x, exists ? from + first + threadIdx.x : from, exists);
  }
}

// Writes this warp's kTiles * 16 accumulator rows, which begin at `row` of the tile and of rows + first, times
// `factor`. They pass through the warp's own rows of the tile, which no other warp may be reading, to be written in 16
// bytes.
template <int kTiles, class T, int kRows, int kDim>
__device__ __forceinline__ void store(const float (&values)[kTiles][kDim / 8][4], const float (&factor)[kTiles][2],
                                      const Tile<T, kRows, kDim>& tile, int row, const Rows<T>& rows, int first) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float f = factor[t][half];
        const uint32_t two = pack_two<T>(values[t][n][2 * half] * f, values[t][n][2 * half + 1] * f);
        T* const chunk = tile.chunk(row + t * 16 + half * 8 + lane / 4, n);
        reinterpret_cast<uint32_t*>(chunk)[lane % 4] = two;
      }
    }
  }
  __syncwarp();
  constexpr int kChunks = kDim / 8;
#pragma unroll
  for (int i = lane; i < kTiles * 16 * kChunks; i += 32) {
    const int r = row + i / kChunks, column = i % kChunks * 8;
    if (first + r >= rows.count || column >= rows.dim) continue;
    const T* const from = tile.chunk(r, i % kChunks);
    T* const to = rows.numbers + (first + r) * rows.stride + column;
    if (rows.by_chunks) {
      *reinterpret_cast<Pack<T>*>(to) = *reinterpret_cast<const Pack<T>*>(from);
    } else {
      for (int e = 0; e < 8 && column + e < rows.dim; ++e) to[e] = from[e];
    }
  }
}

// c[rows, columns] += a b^T, the step k of 16 of the inner dimension. b's rows are the columns of c.
template <class T, int kTiles, int kTilesN, int kDim>
__device__ __forceinline__ void multiply_step(float (&c)[kTiles][kTilesN][4], const uint32_t (&a)[kTiles][4],
                                              const Reader<kDim>& b, int k) {
#pragma unroll
  for (int n = 0; n < kTilesN; n += 2) {
    uint32_t pair[4];
    load_matrices(pair, b.at(n * 8, 2 * k));
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      multiply_add<T>(c[t][n], a[t], pair[0], pair[1]);
      multiply_add<T>(c[t][n + 1], a[t], pair[2], pair[3]);
    }
  }
}

// c[rows, columns] += a b^T
template <class T, int kTiles, int kTilesN, int kDim>
__device__ __forceinline__ void multiply_transposed(float (&c)[kTiles][kTilesN][4], const Reader<kDim>& a,
                                                    const Reader<kDim>& b) {
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t fragments[kTiles][4];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) load_matrices(fragments[t], a.at(t * 16, 2 * k));
    multiply_step<T>(c, fragments, b, k);
  }
}

// c[rows, kDim] += p[rows, inner] b[inner, kDim]; p's accumulators are, rounded to T, the fragments of A.
template <class T, int kTiles, int kTilesInner, int kDim>
__device__ __forceinline__ void multiply_accumulators(float (&c)[kTiles][kDim / 8][4],
                                                      const float (&p)[kTiles][kTilesInner][4],
                                                      const Reader<kDim>& b) {
#pragma unroll
  for (int k = 0; k < kTilesInner / 2; ++k) {
    uint32_t a[kTiles][4];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      a[t][0] = pack_two<T>(p[t][2 * k][0], p[t][2 * k][1]);
      a[t][1] = pack_two<T>(p[t][2 * k][2], p[t][2 * k][3]);
      a[t][2] = pack_two<T>(p[t][2 * k + 1][0], p[t][2 * k + 1][1]);
      a[t][3] = pack_two<T>(p[t][2 * k + 1][2], p[t][2 * k + 1][3]);
    }
#pragma unroll
    for (int n = 0; n < kDim / 8; n += 2) {
      uint32_t pair[4];
      load_matrices_transposed(pair, b.at(k * 16, n));
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        multiply_add<T>(c[t][n], a[t], pair[0], pair[1]);
        multiply_add<T>(c[t][n + 1], a[t], pair[2], pair[3]);
      }
    }
  }
}

// Scores in base 2 from products: times `factor` = scale * log2(e), less the slope's share of the distance, -inf where
// the query does not see the key. `query` is the lane's first row and `key` its first column.
template <int kTiles, int kTilesN>
__device__ __forceinline__ void finish_scores(float (&s)[kTiles][kTilesN][4], const Problem& p, int batch,
                                              float factor, float slope, int query, int key, bool all_visible) {
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[t][n][i] *= factor;
    }
  }
  if (slope == 0.0f && all_visible) return;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = query + t * 16 + half * 8;
      if (slope != 0.0f) {
        const int distance = p.keys - p.queries + row - key;
#pragma unroll
        for (int n = 0; n < kTilesN; ++n) {
          s[t][n][2 * half] -= slope * abs(distance - n * 8);
          s[t][n][2 * half + 1] -= slope * abs(distance - n * 8 - 1);
        }
      }
      if (!all_visible && row < p.queries) {
        const Interval keys = visible(p, batch, row);
        const int low = keys.first - key, high = keys.end - key;
#pragma unroll
        for (int n = 0; n < kTilesN; ++n) {
          if (n * 8 < low || n * 8 >= high) s[t][n][2 * half] = -INFINITY;
          if (n * 8 + 1 < low || n * 8 + 1 >= high) s[t][n][2 * half + 1] = -INFINITY;
        }
      }
    }
  }
}

// Fills problem.spans, where there are bounds. In cuda_forward.cu.
int find_spans(const Problem& problem, cudaStream_t stream);

// Blocks for `tiles` tiles of each head of each row.
inline int64_t blocks_of(const Problem& p, int tiles, int heads) { return int64_t(tiles) * heads * p.batch; }

template <class... More>
bool by_chunks(int dim, const More&... tensors) {
  const auto fits = [](const Heads& t) { return on_16_bytes(t.data) && (t.batch | t.token | t.head) % 8 == 0; };
  return dim % 8 == 0 && (fits(tensors) && ...);
}

// Calls `launch` with the tiles that the device has shared memory for: `Large` where a block can have kBytes.
template <int kBytes, class Large, class Small, class Launch>
int with_tiles(const Problem& p, Launch launch) {
  if constexpr (kBytes > kCudaAttentionSharedBytes) {
    if (p.shared_bytes < kBytes) return launch(Small{});
  }
  return launch(Large{});
}

// Calls `launch` with the format as a type and the padded head dimension as a constant.
template <class Launch>
int with_types(Format format, int dim, Launch launch) {
  const auto with_dim = [&](auto number) -> int {
    if (dim <= 32) return launch(number, std::integral_constant<int, 32>{});
    if (dim <= 64) return launch(number, std::integral_constant<int, 64>{});
    if (dim <= 96) return launch(number, std::integral_constant<int, 96>{});
    if (dim <= 128) return launch(number, std::integral_constant<int, 128>{});
    return launch(number, std::integral_constant<int, kCudaAttentionMaxDim>{});
  };
  switch (format) {
    case Format::kBf16: return with_dim(__nv_bfloat16{});
    case Format::kFp16: return with_dim(__half{});
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace ml::attention
