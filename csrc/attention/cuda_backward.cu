// Flash attention on CUDA, backward (arXiv:2307.08691, algorithm 2). With the weights p = exp(score - lse), recomputed,
// and delta = sum(d_out out) - d_lse for each query:
//   dV = p^T d_out,  dS = p (d_out V^T - delta),  dK = scale dS^T Q,  dQ = scale dS K
// One kernel gives dK and dV: a block of warps holds a tile of keys and passes over the queries, of all heads of the
// group, that see one of them; its scores are transposed, so that p^T and dS^T lie in registers as tensor cores take
// them. A second kernel gives dQ, in the order of loops of the forward. Both compute the weights, so nothing is added
// atomically, and two runs give the same bits.

#include "attention/cuda_tiles.cuh"

namespace ml {
namespace attention {
namespace {

// kTiles * 16 rows of the gradient for each warp; kInner rows of the other side at a time, in two buffers.
template <int kWarps_, int kTiles_, int kInner_>
struct BackwardShape {
  static constexpr int kTiles = kTiles_, kInner = kInner_, kThreads = kWarps_ * 32, kRows = kWarps_ * 16 * kTiles_;
};

template <int kDim> struct KeyShape : BackwardShape<8, 1, 64> {};
template <> struct KeyShape<32> : BackwardShape<4, 2, 32> {};
template <> struct KeyShape<128> : BackwardShape<8, 1, 32> {};
template <> struct KeyShape<256> : BackwardShape<4, 1, 32> {};

template <int kDim> struct QueryShape : BackwardShape<8, 1, 64> {};
template <> struct QueryShape<32> : BackwardShape<4, 2, 64> {};
template <> struct QueryShape<64> : BackwardShape<4, 2, 64> {};
template <> struct QueryShape<256> : BackwardShape<4, 1, 32> {};

// Where a block can have no more than kCudaAttentionSharedBytes: for the two head dimensions that ask for more. The
// same bits: a row meets the other side in the same order.
struct SmallKeyShape : BackwardShape<4, 1, 16> {};
template <int kDim> struct SmallQueryShape : BackwardShape<8, 1, 32> {};
template <> struct SmallQueryShape<256> : BackwardShape<4, 1, 16> {};

// Two tiles of the gradient's rows, two buffers of two tiles of the other side, and for queries their lse and delta.
template <class Shape, class T, int kDim>
constexpr int kTileBytes = (2 * Shape::kRows + 4 * Shape::kInner) * kDim * static_cast<int>(sizeof(T));
template <class Shape>
constexpr int kNumberBytes = 4 * Shape::kInner * static_cast<int>(sizeof(float));
static_assert(kTileBytes<SmallKeyShape, __half, 256> + kNumberBytes<SmallKeyShape> <= kCudaAttentionSharedBytes);
static_assert(kTileBytes<SmallQueryShape<128>, __half, 128> <= kCudaAttentionSharedBytes);
static_assert(kTileBytes<SmallQueryShape<256>, __half, 256> <= kCudaAttentionSharedBytes);

// The weight of a score in base 2: at most 1, however lse was rounded.
__device__ __forceinline__ float weight_of(float score, float lse) {
  return fast_exp2(fminf(score - lse * kLog2E, 0.0f));
}

// As finish_scores, for scores whose rows are keys and whose columns are queries: s becomes the weights.
template <int kTiles, int kTilesN>
__device__ __forceinline__ void transposed_weights(float (&s)[kTiles][kTilesN][4], const Problem& p, int batch,
                                                   float factor, float slope, int query, int key, bool all_visible,
                                                   const float* lse) {
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = query + n * 8 + e, distance = p.keys - p.queries + column - key;
      Interval keys = {0, p.keys};
      if (!all_visible && column < p.queries) keys = visible(p, batch, column);
      const int low = keys.first - key, high = keys.end - key;
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        float& score = s[i / 2][n][i % 2 * 2 + e];
        score *= factor;
        if (slope != 0.0f) score -= slope * abs(distance - i * 8);
        score = weight_of(score, lse[n * 8 + e]);
        if (!all_visible && (i * 8 < low || i * 8 >= high)) score = 0.0f;
      }
    }
  }
}

// dS^T = p^T (d_p^T - delta) over d_p.
template <int kTiles, int kTilesN>
__device__ __forceinline__ void transposed_score_gradients(float (&d_p)[kTiles][kTilesN][4],
                                                           const float (&weights)[kTiles][kTilesN][4],
                                                           const float* delta) {
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
    const float two[2] = {delta[n * 8], delta[n * 8 + 1]};
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) d_p[t][n][i] = weights[t][n][i] * (d_p[t][n][i] - two[i % 2]);
  }
}

// Which queries a tile of keys meets next: tiles of kInner queries, one of which sees one of the keys, for each head of
// the group.
template <int kInner>
struct QueryWalk {
  const Problem& p;
  int batch, key, keys, head, end_head, query;

  __device__ __forceinline__ bool more() const { return head < end_head; }

  // From `query`, included, to the next tile that counts; past the last one, to the next head's first.
  __device__ __forceinline__ void seek() {
    for (;; query += kInner) {
      if (query >= p.queries) {
        if (++head >= end_head) return;
        query = 0;
      }
      if (span_of(p, batch, query, kInner).touches(key, keys)) return;
    }
  }
};

// Writes this warp's rows of a gradient [B, S, heads, D], times `factor`, by way of its rows of `tile`.
template <int kTiles, class T, int kRows, int kDim>
__device__ __forceinline__ void store_gradient(const float (&values)[kTiles][kDim / 8][4], float factor,
                                               const Tile<T, kRows, kDim>& tile, int warp_row, T* gradient, int batch,
                                               int tokens, int heads, int head, int first, int dim) {
  const Rows<T> rows{gradient + (int64_t(batch) * tokens * heads + head) * dim, int64_t(heads) * dim, tokens, dim,
                     dim % 8 == 0};
  float factors[kTiles][2];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) factors[t][0] = factors[t][1] = factor;
  store(values, factors, tile, warp_row, rows, first);
}

// kWantK and kWantV: which of the gradients. Both at once where the registers suffice.
// ceiling: 255 registers, 131584 bytes of shared memory, all of it dynamic (kTileBytes + kNumberBytes)
template <class T, int kDim, class Shape, bool kWantK, bool kWantV>
__global__ void __launch_bounds__(Shape::kThreads)
    attention_backward_keys(Problem p, Heads d_out, Heads q, Heads k, Heads v, const float* lse,
                            const float* delta, T* dk, T* dv, bool by_chunks) {
  constexpr int kTiles = Shape::kTiles, kInner = Shape::kInner, kThreads = Shape::kThreads;
  using KeyTile = Tile<T, Shape::kRows, kDim>;
  using QueryTile = Tile<T, kInner, kDim>;
  const int num_tiles = (p.keys + Shape::kRows - 1) / Shape::kRows, group = p.heads / p.key_heads;
  const int first = blockIdx.x % num_tiles * Shape::kRows;  // the keys that most queries see first
  const int head = blockIdx.x / num_tiles % p.key_heads, batch = blockIdx.x / num_tiles / p.key_heads;
  const int warp_row = threadIdx.x / 32 * 16 * kTiles, lane = threadIdx.x % 32;

  T* const shared = dynamic_shared<T>();
  const KeyTile k_tile{shared}, v_tile{shared + KeyTile::kSize};
  T* const buffers = v_tile.numbers + KeyTile::kSize;  // Q, d_out, Q, d_out
  float* const numbers = reinterpret_cast<float*>(buffers + 4 * QueryTile::kSize);  // lse, delta, lse, delta
  const float factor = p.scale * kLog2E;
  QueryWalk<kInner> walk{p, batch, first, Shape::kRows, head * group, head * group + group, 0};
  walk.seek();

  const auto load_queries = [&](int buffer) {
    const int64_t row = (int64_t(batch) * p.heads + walk.head) * p.queries;
    const QueryTile q_tile{buffers + buffer * 2 * QueryTile::kSize}, d_tile{q_tile.numbers + QueryTile::kSize};
    load<kThreads>(q_tile, rows_of<T>(q, batch, walk.head, p.queries, p.dim, by_chunks), walk.query);
    load<kThreads>(d_tile, rows_of<T>(d_out, batch, walk.head, p.queries, p.dim, by_chunks), walk.query);
    load_numbers<kInner>(numbers + buffer * 2 * kInner, lse + row, walk.query, p.queries);
    load_numbers<kInner>(numbers + (buffer * 2 + 1) * kInner, delta + row, walk.query, p.queries);
  };
  if (walk.more()) {
    load<kThreads>(k_tile, rows_of<T>(k, batch, head, p.keys, p.dim, by_chunks), first);
    if (kWantK) load<kThreads>(v_tile, rows_of<T>(v, batch, head, p.keys, p.dim, by_chunks), first);
    load_queries(0);
  }
  copy_async_commit();
  const auto k_reader = a_reader(k_tile, warp_row), v_reader = a_reader(v_tile, warp_row);
  float dk_sums[kTiles][kDim / 8][4] = {}, dv_sums[kTiles][kDim / 8][4] = {};
  for (int buffer = 0; walk.more(); buffer ^= 1) {
    const int query = walk.query, query_head = walk.head;
    walk.query += kInner;
    walk.seek();
    if (walk.more()) load_queries(buffer ^ 1);
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();
    const QueryTile q_tile{buffers + buffer * 2 * QueryTile::kSize}, d_tile{q_tile.numbers + QueryTile::kSize};
    const float* const own = numbers + buffer * 2 * kInner + lane % 4 * 2;
    const float slope = p.slopes == nullptr ? 0.0f : p.slopes[query_head] * kLog2E;
    float weights[kTiles][kInner / 8][4] = {};
    multiply_transposed<T>(weights, k_reader, b_reader(q_tile));
    transposed_weights(weights, p, batch, factor, slope, query + lane % 4 * 2, first + warp_row + lane / 4,
                       span_of(p, batch, query, kInner).covers(first, Shape::kRows), own);
    if constexpr (kWantV) multiply_accumulators<T>(dv_sums, weights, b_reader_transposed(d_tile));
    if constexpr (kWantK) {
      float d_scores[kTiles][kInner / 8][4] = {};
      multiply_transposed<T>(d_scores, v_reader, b_reader(d_tile));
      transposed_score_gradients(d_scores, weights, own + kInner);
      multiply_accumulators<T>(dk_sums, d_scores, b_reader_transposed(q_tile));
    }
    __syncthreads();  // all warps are done with this buffer
  }
  copy_async_wait<0>();
  if constexpr (kWantK)
    store_gradient(dk_sums, p.scale, k_tile, warp_row, dk, batch, p.keys, p.key_heads, head, first, p.dim);
  if constexpr (kWantV)
    store_gradient(dv_sums, 1.0f, v_tile, warp_row, dv, batch, p.keys, p.key_heads, head, first, p.dim);
}

// dS = p (d_p - delta) over d_p.
template <int kTiles, int kTilesN>
__device__ __forceinline__ void score_gradients(float (&d_p)[kTiles][kTilesN][4],
                                                const float (&scores)[kTiles][kTilesN][4],
                                                const float (&lse)[kTiles][2], const float (&delta)[kTiles][2]) {
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int n = 0; n < kTilesN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        d_p[t][n][i] = weight_of(scores[t][n][i], lse[t][i / 2]) * (d_p[t][n][i] - delta[t][i / 2]);
}

// ceiling: 255 registers, 131072 bytes of shared memory, all of it dynamic (kTileBytes)
template <class T, int kDim, class Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    attention_backward_queries(Problem p, Heads d_out, Heads q, Heads k, Heads v, const float* lse,
                               const float* delta, T* dq, bool by_chunks) {
  constexpr int kTiles = Shape::kTiles, kInner = Shape::kInner, kThreads = Shape::kThreads;
  using QueryTile = Tile<T, Shape::kRows, kDim>;
  using KeyTile = Tile<T, kInner, kDim>;
  const int num_tiles = (p.queries + Shape::kRows - 1) / Shape::kRows;
  const int first = (num_tiles - 1 - blockIdx.x % num_tiles) * Shape::kRows;  // the longest rows first
  const int head = blockIdx.x / num_tiles % p.heads, batch = blockIdx.x / num_tiles / p.heads;
  const int key_head = head / (p.heads / p.key_heads);
  const int warp_row = threadIdx.x / 32 * 16 * kTiles, lane = threadIdx.x % 32;

  T* const shared = dynamic_shared<T>();
  const QueryTile q_tile{shared}, d_tile{shared + QueryTile::kSize};
  T* const buffers = d_tile.numbers + QueryTile::kSize;  // K, V, K, V
  const auto load_keys = [&](int buffer, int key) {
    const KeyTile k_tile{buffers + buffer * 2 * KeyTile::kSize}, v_tile{k_tile.numbers + KeyTile::kSize};
    load<kThreads>(k_tile, rows_of<T>(k, batch, key_head, p.keys, p.dim, by_chunks), key);
    load<kThreads>(v_tile, rows_of<T>(v, batch, key_head, p.keys, p.dim, by_chunks), key);
  };
  const Span span = span_of(p, batch, first, Shape::kRows);
  const float factor = p.scale * kLog2E, slope = p.slopes == nullptr ? 0.0f : p.slopes[head] * kLog2E;
  int key = span.first / kInner * kInner;
  if (key < span.end) {
    load<kThreads>(q_tile, rows_of<T>(q, batch, head, p.queries, p.dim, by_chunks), first);
    load<kThreads>(d_tile, rows_of<T>(d_out, batch, head, p.queries, p.dim, by_chunks), first);
    load_keys(0, key);
  }
  copy_async_commit();
  float lse_rows[kTiles][2], delta_rows[kTiles][2];
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    const int row = first + warp_row + lane / 4 + i * 8;
    const int64_t at = (int64_t(batch) * p.heads + head) * p.queries + row;
    const float known = row < p.queries ? lse[at] : 0.0f;
    lse_rows[i / 2][i % 2] = known == -INFINITY ? 0.0f : known;  // of a row that sees nothing: all weights are 0
    delta_rows[i / 2][i % 2] = row < p.queries ? delta[at] : 0.0f;
  }
  const auto q_reader = a_reader(q_tile, warp_row), d_reader = a_reader(d_tile, warp_row);
  float sums[kTiles][kDim / 8][4] = {};
  for (int buffer = 0; key < span.end; key += kInner, buffer ^= 1) {
    if (key + kInner < span.end) load_keys(buffer ^ 1, key + kInner);
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();
    const KeyTile k_tile{buffers + buffer * 2 * KeyTile::kSize}, v_tile{k_tile.numbers + KeyTile::kSize};
    float scores[kTiles][kInner / 8][4] = {}, d_scores[kTiles][kInner / 8][4] = {};
    multiply_transposed<T>(scores, q_reader, b_reader(k_tile));
    finish_scores(scores, p, batch, factor, slope, first + warp_row + lane / 4, key + lane % 4 * 2,
                  span.covers(key, kInner));
    multiply_transposed<T>(d_scores, d_reader, b_reader(v_tile));
    score_gradients(d_scores, scores, lse_rows, delta_rows);
    multiply_accumulators<T>(sums, d_scores, b_reader_transposed(k_tile));
    __syncthreads();  // all warps are done with this buffer
  }
  copy_async_wait<0>();
  store_gradient(sums, p.scale, q_tile, warp_row, dq, batch, p.queries, p.heads, head, first, p.dim);
}

// delta[B, H, Sq]; eight lanes for each of the B Sq H rows. A row that sees nothing has no gradient, whatever d_lse is.
// ceiling: 48 registers, 0 bytes of shared memory
template <class T>
__global__ void attention_delta(Problem p, Heads d_out, Heads out, const float* lse, const float* d_lse,
                                float* delta, bool by_chunks) {
  const int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 8, lane = threadIdx.x % 8;
  const int head = row % p.heads, batch = row / p.heads / p.queries, query = row / p.heads % p.queries;
  const bool exists = batch < p.batch;
  float sum = 0.0f;
  if (exists) {
    const T* const a = rows_of<T>(d_out, batch, head, p.queries, p.dim, by_chunks).numbers + query * d_out.token;
    const T* const b = rows_of<T>(out, batch, head, p.queries, p.dim, by_chunks).numbers + query * out.token;
    for (int d = lane * 8; d < p.dim; d += 64) {
      Pack<T> x = {}, y = {};
      if (by_chunks) {
        x = *reinterpret_cast<const Pack<T>*>(a + d), y = *reinterpret_cast<const Pack<T>*>(b + d);
      } else {
        for (int e = 0; e < 8 && d + e < p.dim; ++e) x.values[e] = a[d + e], y.values[e] = b[d + e];
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) sum += to_float(x.values[e]) * to_float(y.values[e]);
    }
  }
#pragma unroll
  for (int offset = 4; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (!exists || lane != 0) return;
  const int64_t at = (int64_t(batch) * p.heads + head) * p.queries + query;
  delta[at] = lse[at] == -INFINITY ? 0.0f : sum - (d_lse == nullptr ? 0.0f : d_lse[at]);
}

// ---- launchers

struct Inputs {
  Heads d_out, q, k, v, out;
  const float *lse, *d_lse;
};

template <class T>
int launch_delta(const Problem& p, const Inputs& in, float* delta, cudaStream_t stream) {
  const int64_t blocks = (int64_t(p.batch) * p.queries * p.heads * 8 + 255) / 256;
  return ml::launch(attention_delta<T>, blocks, 256, 0, stream, p, in.d_out, in.out, in.lse, in.d_lse, delta,
                    by_chunks(p.dim, in.d_out, in.out));
}

template <class T, int kDim, bool kWantK, bool kWantV>
int launch_keys(const Problem& p, const Inputs& in, const Gradients& g, cudaStream_t stream) {
  using Large = KeyShape<kDim>;
  constexpr int kBytes = kTileBytes<Large, T, kDim> + kNumberBytes<Large>;
  return with_tiles<kBytes, Large, SmallKeyShape>(p, [&](auto tiles) -> int {
    using Shape = decltype(tiles);
    const int64_t grid = blocks_of(p, (p.keys + Shape::kRows - 1) / Shape::kRows, p.key_heads);
    return ml::launch(attention_backward_keys<T, kDim, Shape, kWantK, kWantV>, grid, Shape::kThreads,
                      kTileBytes<Shape, T, kDim> + kNumberBytes<Shape>, stream, p, in.d_out, in.q, in.k, in.v, in.lse,
                      g.delta, static_cast<T*>(g.dk), static_cast<T*>(g.dv),
                      by_chunks(p.dim, in.d_out, in.q, in.k, in.v));
  });
}

template <class T, int kDim>
int launch_queries(const Problem& p, const Inputs& in, const Gradients& g, cudaStream_t stream) {
  using Large = QueryShape<kDim>;
  return with_tiles<kTileBytes<Large, T, kDim>, Large, SmallQueryShape<kDim>>(p, [&](auto tiles) -> int {
    using Shape = decltype(tiles);
    const int64_t grid = blocks_of(p, (p.queries + Shape::kRows - 1) / Shape::kRows, p.heads);
    return ml::launch(attention_backward_queries<T, kDim, Shape>, grid, Shape::kThreads, kTileBytes<Shape, T, kDim>,
                      stream, p, in.d_out, in.q, in.k, in.v, in.lse, g.delta, static_cast<T*>(g.dq),
                      by_chunks(p.dim, in.d_out, in.q, in.k, in.v));
  });
}

template <class T, int kDim>
int launch_backward(const Problem& p, const Inputs& in, const Gradients& g, cudaStream_t stream) {
  int code = cudaSuccess;
  const auto then = [&](auto launch) { code = code == cudaSuccess ? launch(p, in, g, stream) : code; };
  if (p.queries > 0) {
    code = launch_delta<T>(p, in, g.delta, stream);
    then(launch_queries<T, kDim>);
  }
  if (p.keys == 0) return code;
  if constexpr (kDim <= 128) {
    then(launch_keys<T, kDim, true, true>);
  } else {
    then(launch_keys<T, kDim, true, false>);
    then(launch_keys<T, kDim, false, true>);
  }
  return code;
}

}  // namespace
}  // namespace attention

int attention_backward_cuda(Format format, const CudaAttentionProblem& problem, const CudaHeads& d_out,
                            const CudaHeads& q, const CudaHeads& k, const CudaHeads& v, const CudaHeads& out,
                            const float* lse, const float* d_lse, const CudaAttentionGradients& gradients,
                            void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  if (int code = attention::find_spans(problem, stream); code != cudaSuccess) return code;
  const attention::Inputs inputs{d_out, q, k, v, out, lse, d_lse};
  return attention::with_types(format, problem.dim, [&](auto number, auto dim) {
    return attention::launch_backward<decltype(number), decltype(dim)::value>(problem, inputs, gradients, stream);
  });
}

}  // namespace ml
