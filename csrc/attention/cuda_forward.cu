// Flash attention on CUDA, forward (arXiv:2205.14135, algorithm 1, in the order of loops of arXiv:2307.08691): a block
// of warps holds a tile of queries and passes over the keys that one of them sees. A row keeps the largest score so
// far, the sum of exp(score - largest) and the output scaled alike; a larger score rescales both.
//
// One tile of K and one of V are in shared memory. The next K arrives while the scores become weights and meet V, and V
// arrives while Q meets K.

#include "attention/cuda_tiles.cuh"

namespace ml {
namespace attention {
namespace {

// kTiles * 16 queries for each warp: two tiles halve what shared memory has to deliver for each product, where the
// registers suffice. kHeld: Q's fragments stay in registers.
template <int kWarps_, int kTiles_, int kKeys_, bool kHeld_>
struct ForwardShape {
  static constexpr int kTiles = kTiles_, kKeys = kKeys_, kThreads = kWarps_ * 32, kQueries = kWarps_ * 16 * kTiles_;
  static constexpr bool kHeld = kHeld_;
};

template <int kDim> struct Forward : ForwardShape<4, 2, 32, false> {};
template <> struct Forward<32> : ForwardShape<4, 2, 64, true> {};
template <> struct Forward<64> : ForwardShape<4, 2, 64, true> {};
template <> struct Forward<256> : ForwardShape<8, 1, 64, false> {};

template <class Shape, class T, int kDim>
constexpr int kForwardBytes = (Shape::kQueries + 2 * Shape::kKeys) * kDim * static_cast<int>(sizeof(T));

// Where a block can have no more than kCudaAttentionSharedBytes. The same bits: a query's keys come in the same order.
struct SmallForward : ForwardShape<4, 1, 64, false> {};
static_assert(kForwardBytes<SmallForward, __half, kCudaAttentionMaxDim> <= kCudaAttentionSharedBytes);

// The scores become weights: exp2(score - largest so far). Rescales the sums and the outputs.
template <int kTiles, int kTilesN, int kTilesD>
__device__ __forceinline__ void softmax_step(float (&s)[kTiles][kTilesN][4], float (&out)[kTiles][kTilesD][4],
                                             float (&largest)[kTiles][2], float (&sum)[kTiles][2]) {
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = largest[t][half];
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) most = fmaxf(most, fmaxf(s[t][n][2 * half], s[t][n][2 * half + 1]));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      const float base = most == -INFINITY ? 0.0f : most;  // no key seen yet: -inf - -inf is not a number
      const float rescale = fast_exp2(largest[t][half] - base);
      float added = 0.0f;
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          s[t][n][e] = fast_exp2(s[t][n][e] - base);
          added += s[t][n][e];
        }
      }
      largest[t][half] = most;
      sum[t][half] = sum[t][half] * rescale + added;
      if (__any_sync(0xffffffffu, rescale != 1.0f)) {  // seldom after the first keys
#pragma unroll
        for (int n = 0; n < kTilesD; ++n) {
          out[t][n][2 * half] *= rescale;
          out[t][n][2 * half + 1] *= rescale;
        }
      }
    }
  }
}

// Writes lse, and turns the lanes' shares of the sums into what the outputs are to be multiplied with.
template <int kTiles>
__device__ __forceinline__ void finish_rows(const float (&largest)[kTiles][2], float (&sum)[kTiles][2], float* lse,
                                            int query, int queries) {
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float all = sum[t][half];
      all += __shfl_xor_sync(0xffffffffu, all, 1);
      all += __shfl_xor_sync(0xffffffffu, all, 2);
      const int row = query + t * 16 + half * 8;
      const bool sees = all != 0.0f;  // NaN stays NaN
      if (threadIdx.x % 4 == 0 && row < queries)
        lse[row] = sees ? (largest[t][half] + log2f(all)) * kLn2 : -INFINITY;
      sum[t][half] = sees ? 1.0f / all : 0.0f;
    }
  }
}

// ceiling: 255 registers, 131072 bytes of shared memory, all of it dynamic (kForwardBytes)
template <class T, int kDim, class Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    attention_forward(Problem p, Heads q, Heads k, Heads v, T* out, float* lse, bool by_chunks) {
  constexpr int kTiles = Shape::kTiles, kKeys = Shape::kKeys, kThreads = Shape::kThreads;
  const int num_tiles = (p.queries + Shape::kQueries - 1) / Shape::kQueries;
  const int first = (num_tiles - 1 - blockIdx.x % num_tiles) * Shape::kQueries;  // the longest rows first
  const int head = blockIdx.x / num_tiles % p.heads, batch = blockIdx.x / num_tiles / p.heads;
  const int key_head = head / (p.heads / p.key_heads);
  const int warp_row = threadIdx.x / 32 * 16 * kTiles, lane = threadIdx.x % 32;

  const Tile<T, Shape::kQueries, kDim> q_tile{dynamic_shared<T>()};
  const Tile<T, kKeys, kDim> k_tile{q_tile.numbers + q_tile.kSize}, v_tile{k_tile.numbers + k_tile.kSize};
  const auto q_reader = a_reader(q_tile, warp_row), k_reader = b_reader(k_tile), v_reader = b_reader_transposed(v_tile);
  const auto q_rows = rows_of<T>(q, batch, head, p.queries, p.dim, by_chunks);
  const auto k_rows = rows_of<T>(k, batch, key_head, p.keys, p.dim, by_chunks);
  const auto v_rows = rows_of<T>(v, batch, key_head, p.keys, p.dim, by_chunks);

  const Span span = span_of(p, batch, first, Shape::kQueries);
  const float factor = p.scale * kLog2E, slope = p.slopes == nullptr ? 0.0f : p.slopes[head] * kLog2E;
  float sums[kTiles][2] = {}, largest[kTiles][2], outputs[kTiles][kDim / 8][4] = {};
#pragma unroll
  for (int t = 0; t < kTiles; ++t) largest[t][0] = largest[t][1] = -INFINITY;

  int key = span.first / kKeys * kKeys;
  if (key < span.end) {
    load<kThreads>(q_tile, q_rows, first);
    load<kThreads>(k_tile, k_rows, key);
    copy_async_commit();
  }
  uint32_t held[Shape::kHeld ? kDim / 16 : 1][kTiles][4];
  if (Shape::kHeld && key < span.end) {
    copy_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d)
#pragma unroll
      for (int t = 0; t < kTiles; ++t) load_matrices(held[Shape::kHeld ? d : 0][t], q_reader.at(t * 16, 2 * d));
  }
  for (; key < span.end; key += kKeys) {
    copy_async_wait<0>();
    __syncthreads();  // K is here, and all warps are done with the V before
    load<kThreads>(v_tile, v_rows, key);
    copy_async_commit();
    float scores[kTiles][kKeys / 8][4] = {};
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
      auto& fragments = held[Shape::kHeld ? d : 0];
#pragma unroll
      for (int t = 0; t < kTiles && !Shape::kHeld; ++t) load_matrices(fragments[t], q_reader.at(t * 16, 2 * d));
      multiply_step<T>(scores, fragments, k_reader, d);
    }
    copy_async_wait<0>();
    __syncthreads();  // V is here, and all warps are done with this K
    if (key + kKeys < span.end) load<kThreads>(k_tile, k_rows, key + kKeys);
    copy_async_commit();
    finish_scores(scores, p, batch, factor, slope, first + warp_row + lane / 4, key + lane % 4 * 2,
                  span.covers(key, kKeys));
    softmax_step(scores, outputs, largest, sums);
    multiply_accumulators<T>(outputs, scores, v_reader);
  }
  finish_rows(largest, sums, lse + (int64_t(batch) * p.heads + head) * p.queries, first + warp_row + lane / 4,
              p.queries);
  const Rows<T> out_rows{out + (int64_t(batch) * p.queries * p.heads + head) * p.dim, int64_t(p.heads) * p.dim,
                         p.queries, p.dim, p.dim % 8 == 0};
  store(outputs, sums, q_tile, warp_row, out_rows, first);
}

template <class T, int kDim>
int launch_forward(const Problem& p, const Heads& q, const Heads& k, const Heads& v, void* out, float* lse,
                   cudaStream_t stream) {
  using Large = Forward<kDim>;
  return with_tiles<kForwardBytes<Large, T, kDim>, Large, SmallForward>(p, [&](auto tiles) -> int {
    using Shape = decltype(tiles);
    const int64_t grid = blocks_of(p, (p.queries + Shape::kQueries - 1) / Shape::kQueries, p.heads);
    return ml::launch(attention_forward<T, kDim, Shape>, grid, Shape::kThreads, kForwardBytes<Shape, T, kDim>, stream,
                      p, q, k, v, static_cast<T*>(out), lse, by_chunks(p.dim, q, k, v));
  });
}

// One warp for each kCudaAttentionSpan queries.
// ceiling: 32 registers, 0 bytes of shared memory
__global__ void attention_spans(Problem p, Span* spans) {
  static_assert(kCudaAttentionSpan == 32);
  const int tiles = (p.queries + kCudaAttentionSpan - 1) / kCudaAttentionSpan;
  const int batch = blockIdx.x / tiles, query = blockIdx.x % tiles * kCudaAttentionSpan + threadIdx.x;
  Span span = {kNoKey, 0, 0, kNoKey};
  if (query < p.queries) {
    const Interval keys = visible(p, batch, query);
    const bool sees = keys.first < keys.end;
    span = {sees ? keys.first : kNoKey, sees ? keys.end : 0, sees ? keys.first : kNoKey, sees ? keys.end : 0};
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    span = join(span, {__shfl_xor_sync(0xffffffffu, span.first, offset), __shfl_xor_sync(0xffffffffu, span.end, offset),
                       __shfl_xor_sync(0xffffffffu, span.all_first, offset),
                       __shfl_xor_sync(0xffffffffu, span.all_end, offset)});
  }
  if (threadIdx.x == 0) spans[blockIdx.x] = span;
}

}  // namespace

int find_spans(const Problem& p, cudaStream_t stream) {
  if (p.bounds == nullptr) return cudaSuccess;
  const int64_t grid = blocks_of(p, (p.queries + kCudaAttentionSpan - 1) / kCudaAttentionSpan, 1);
  return ml::launch(attention_spans, grid, kCudaAttentionSpan, 0, stream, p, reinterpret_cast<Span*>(p.spans));
}

}  // namespace attention

int attention_forward_cuda(Format format, const CudaAttentionProblem& problem, const CudaHeads& q, const CudaHeads& k,
                           const CudaHeads& v, void* out, float* lse, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  if (int code = attention::find_spans(problem, stream); code != cudaSuccess) return code;
  return attention::with_types(format, problem.dim, [&](auto number, auto dim) {
    return attention::launch_forward<decltype(number), decltype(dim)::value>(problem, q, k, v, out, lse, stream);
  });
}

}  // namespace ml
