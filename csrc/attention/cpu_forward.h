// Flash attention, forward (arXiv:2205.14135, algorithm 1, with the loop over queries outside as in arXiv:2307.08691).
//
// A block of queries runs over the blocks of keys that one of them sees. Blocks of keys begin at multiples of kKeys,
// whatever the queries, and a row of a product depends on no other row: so a query's bits depend on its own keys and
// their places alone. What a query sees is a range of keys, so masks are limits of loops, and half vectors at both
// ends.
#pragma once

#include "attention/cpu_products.h"

namespace {

constexpr int64_t kQueries = 96;  // a multiple of kRows
constexpr int64_t kKeys = 192;    // a multiple of kPanel

// The largest of the scores of the keys `own`, -inf without any.
ML_INLINE float largest_of(const float* scores, Range own) {
  const f32x16 none = broadcast(-__builtin_inff());
  f32x16 largest = none;
  for (int64_t i = own.first / kLanes * kLanes; i < own.last; i += kLanes) {
    f32x16 lanes = Fp32::load(scores + i);
    if (i < own.first || i + kLanes > own.last) lanes = lanes_between(lanes, own.first - i, own.last - i, none);
    largest = larger(lanes, largest);
  }
  return largest_lane(largest);
}

// Turns the scores of one query into weights 2^(scale (score - top)) for the keys `own`, and zero for the others of
// `vectors`. Returns their sums, lane by lane.
ML_INLINE f32x16 weigh(float* scores, Range own, Range vectors, float scale, float top) {
  const f32x16 top_lanes = broadcast(top), scale_lanes = broadcast(scale);
  f32x16 sum{};
  for (int64_t i = vectors.first; i < vectors.last; i += kLanes) {
    f32x16 weights = exp2((Fp32::load(scores + i) - top_lanes) * scale_lanes);
    if (i < own.first || i + kLanes > own.last) weights = lanes_between(weights, own.first - i, own.last - i, f32x16{});
    sum += weights;
    Fp32::store(scores + i, weights);
  }
  return sum;
}

template <class W, class T>
struct Forward {
  const ml::AttentionProblem& p;
  Sizes<W> sizes;
  int64_t padded_keys, steps;  // steps: of a product over dim

  explicit Forward(const ml::AttentionProblem& problem)
      : p(problem),
        sizes(problem),
        padded_keys(up_to(problem.num_keys, kKeys)),
        steps((problem.dim + W::kUnit - 1) / W::kUnit) {}

  int64_t columns_floats() const { return padded_keys * steps; }
  int64_t head_floats() const { return columns_floats() + padded_keys / W::kUnit * sizes.padded_dim; }
  int64_t query_blocks() const { return (p.num_queries + kQueries - 1) / kQueries; }
  int64_t scratch_floats() const {
    return kQueries * (sizes.row_words + sizes.padded_dim + 1 + kLanes + sizeof(Range) / sizeof(float)) + kLanes +
           2 * kRows * kKeys;
  }

  void pack(float* packed, float* scratch, int64_t begin, int64_t end) const {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / p.kv_heads, head = item % p.kv_heads;
      float* own = packed + item * head_floats();
      pack_columns<W, T>(sizes, p.k, b, head, p.num_keys, padded_keys, own, scratch);
      pack_depth<W, T>(sizes, p.v, b, head, p.num_keys, padded_keys, own + columns_floats());
    }
  }

  // The running sums of a block of queries.
  struct State {
    float *queries, *sums, *scores, *weights, *top, *total, *factors;
    Range* ranges;
    State(const Forward& f, float* scratch) {
      const auto take = [&](int64_t floats) {
        float* piece = scratch;
        scratch += floats;
        return piece;
      };
      queries = take(kQueries * f.sizes.row_words);
      sums = take(kQueries * f.sizes.padded_dim);
      scores = take(kRows * kKeys);
      weights = take(kRows * kKeys);
      top = take(kQueries);
      total = take(kQueries * kLanes);
      factors = take(kLanes);
      ranges = reinterpret_cast<Range*>(scratch);
    }
  };

  void step(State& s, const float* columns, const float* depth, int64_t row, int64_t num_rows, int64_t first_key,
            int64_t first_position, float slope) const;
  void store(const State& s, int64_t b, int64_t head, int64_t first, int64_t count, void* out, float* lse,
             float* stats) const;
  void run(const float* packed, void* out, float* lse, float* stats, float* scratch, int64_t begin, int64_t end) const;
};

// One block of keys, from `first_key`, for kRows queries from `row` of the block.
template <class W, class T>
inline void Forward<W, T>::step(State& s, const float* columns, const float* depth, int64_t row, int64_t num_rows,
                                int64_t first_key, int64_t first_position, float slope) const {
  const Range hull = hull_of(s.ranges + row, num_rows, first_key, kKeys);
  if (hull.empty()) return;
  const Range vectors{hull.first / kLanes * kLanes, up_to(hull.last, kLanes)};
  const float* queries = s.queries + row * sizes.row_words;
  for (int64_t panel = hull.first / kPanel * kPanel; panel < hull.last; panel += kPanel)
    dim_product<W>(queries, sizes.row_words, columns + (first_key + panel) * steps, steps, s.scores + panel, kKeys);
  const bool has_slope = p.slopes != nullptr;
  const float scale = has_slope ? kLog2E : p.scale * kLog2E;
  Range own[kRows];
  float before[kLanes] = {}, top[kLanes] = {};
  for (int64_t r = 0; r < num_rows; ++r) {
    const Range seen = s.ranges[row + r];
    own[r] = {max_of(seen.first - first_key, 0), min_of(seen.last - first_key, kKeys)};
    float* scores = s.scores + r * kKeys;
    if (has_slope)
      add_slope(scores, vectors.first, vectors.last, first_key, first_position + row + r, p.scale, slope);
    before[r] = top[r] = s.top[row + r];
    if (own[r].empty()) continue;
    const float block_top = largest_of(scores, own[r]);
    top[r] = block_top > before[r] ? block_top : before[r];
    s.top[row + r] = top[r];
  }
  Fp32::store(s.factors, exp2((Fp32::load(before) - Fp32::load(top)) * broadcast(scale)));
  for (int64_t r = 0; r < kRows; ++r) {
    float* scores = s.scores + r * kKeys;
    if (r >= num_rows || own[r].empty()) {
      zero(scores, vectors.first, vectors.last);
      s.factors[r] = 1.0f;
      continue;
    }
    float* total = s.total + (row + r) * kLanes;
    const f32x16 sum = weigh(scores, own[r], vectors, scale, top[r]);
    Fp32::store(total, Fp32::load(total) * broadcast(s.factors[r]) + sum);
  }
  const float* weights = W::pack_weights(s.scores, s.weights, kKeys, vectors.first, vectors.last);
  const int64_t begin = hull.first / W::kUnit, end = (hull.last + W::kUnit - 1) / W::kUnit;
  depth_product<W, false, Start::kScaledSum>(sizes, weights + begin, kKeys / W::kUnit, depth,
                                             padded_keys / W::kUnit, first_key / W::kUnit + begin,
                                             first_key / W::kUnit + end, s.sums + row * sizes.padded_dim, s.factors);
}

template <class W, class T>
inline void Forward<W, T>::store(const State& s, int64_t b, int64_t head, int64_t first, int64_t count, void* out,
                                 float* lse, float* stats) const {
  using Stored = typename T::Stored;
  for (int64_t i = 0; i < count; ++i) {
    Stored* target = static_cast<Stored*>(out) + ((b * p.num_queries + first + i) * p.heads + head) * p.dim;
    const int64_t index = (b * p.heads + head) * p.num_queries + first + i;
    const bool sees = !s.ranges[i].empty();
    const float total = sum_lanes(Fp32::load(s.total + i * kLanes));
    const float inverse = sees ? 1.0f / total : 0.0f;
    lse[index] = sees ? s.top[i] * (p.slopes == nullptr ? p.scale : 1.0f) + __builtin_logf(total) : -__builtin_inff();
    stats[2 * index] = sees ? s.top[i] : 0.0f;
    stats[2 * index + 1] = inverse;
    const float* sums = s.sums + i * sizes.padded_dim;
    for (int64_t d = 0; d < p.dim; d += kLanes)
      store_up_to<T>(target + d, Fp32::load(sums + d) * broadcast(inverse), p.dim - d);
  }
}

template <class W, class T>
inline void Forward<W, T>::run(const float* packed, void* out, float* lse, float* stats, float* scratch, int64_t begin,
                               int64_t end) const {
  State s(*this, scratch);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item / query_blocks() % p.heads, b = item / query_blocks() / p.heads;
    const int64_t first = item % query_blocks() * kQueries, count = min_of(kQueries, p.num_queries - first);
    const float* columns = packed + (b * p.kv_heads + head / (p.heads / p.kv_heads)) * head_floats();
    pack_rows<W, T>(sizes, p.q, b, head, first, count, up_to(count, kRows), s.queries);
    for (int64_t i = 0; i < count; ++i) {
      s.ranges[i] = range_of(p, b, first + i);
      s.top[i] = -__builtin_inff();
    }
    zero(s.total, 0, count * kLanes);
    zero(s.sums, 0, up_to(count, kRows) * sizes.padded_dim);
    const Range seen = hull_of(s.ranges, count, 0, p.num_keys);
    for (int64_t first_key = seen.first / kKeys * kKeys; first_key < seen.last; first_key += kKeys)
      for (int64_t row = 0; row < count; row += kRows)
        step(s, columns, columns + columns_floats(), row, min_of(kRows, count - row), first_key,
             p.num_keys - p.num_queries + first, p.slopes == nullptr ? 0.0f : p.slopes[head]);
    store(s, b, head, first, count, out, lse, stats);
  }
}

}  // namespace
