// Flash attention, backward (arXiv:2307.08691, algorithm 2): scores and weights are computed again, block by block.
//
// An item is one or more query heads of a group. For a head, keys are the outer loop and queries the inner one: the
// gradients of a block of keys stay in one place until they are done and are then added to those of the group's heads
// before it; those of the queries collect in fp32. All sums have one order, which the lengths alone fix.
#pragma once

#include "attention/cpu_products.h"

namespace {

constexpr int64_t kBackwardQueries = 96;  // a multiple of kRows and of every kUnit
constexpr int64_t kBackwardKeys = 192;    // a multiple of kPanel and of kRows

// weights = e^(score - lse) into scores, and d_scores = weights (d_weights - delta) into d_weights, for one query and
// the keys `own`; zero for the others of `vectors`.
ML_INLINE void differentiate(float* scores, float* d_weights, Range own, Range vectors, float scale, float top,
                             float inverse, float delta) {
  const f32x16 top_lanes = broadcast(top), scale_lanes = broadcast(scale), inverse_lanes = broadcast(inverse);
  const f32x16 delta_lanes = broadcast(delta);
  for (int64_t i = vectors.first; i < vectors.last; i += kLanes) {
    f32x16 weights = exp2((Fp32::load(scores + i) - top_lanes) * scale_lanes) * inverse_lanes;
    f32x16 d_scores = weights * (Fp32::load(d_weights + i) - delta_lanes);
    if (i < own.first || i + kLanes > own.last) {
      weights = lanes_between(weights, own.first - i, own.last - i, f32x16{});
      d_scores = lanes_between(d_scores, own.first - i, own.last - i, f32x16{});
    }
    Fp32::store(scores + i, weights);
    Fp32::store(d_weights + i, d_scores);
  }
}

template <class W, class T>
struct Backward {
  static constexpr int64_t kQueries = kBackwardQueries, kKeys = kBackwardKeys;
  const ml::AttentionProblem& p;
  const ml::AttentionGradients& g;
  Sizes<W> sizes;
  int64_t padded_queries, padded_keys, steps, group;

  Backward(const ml::AttentionProblem& problem, const ml::AttentionGradients& gradients)
      : p(problem),
        g(gradients),
        sizes(problem),
        padded_queries(up_to(max_of(problem.num_queries, 1), kQueries)),
        padded_keys(up_to(problem.num_keys, kKeys)),
        steps((problem.dim + W::kUnit - 1) / W::kUnit),
        group(problem.heads / problem.kv_heads) {}

  int64_t sums_floats() const { return padded_keys * sizes.padded_dim; }
  int64_t part_floats() const { return 2 * sums_floats(); }

  // One thread's memory, cut into its pieces.
  struct State {
    float *k_columns, *v_columns, *k_depth;                       // of the key head
    float *q_rows, *d_out_rows, *q_depth, *d_out_depth, *dq;      // of the query head
    float *top, *inverse, *delta;                                 // a number for each query
    float *scores, *d_weights;                                    // kRows queries and a block of keys, fp32
    float *weights_T, *d_scores_T, *d_scores;                     // a block of both, words
    float *dk, *dv, *sums;                                        // of a block of keys; of the item, k's and v's
    Range* ranges;
    int64_t floats;
    State(const Backward& b, float* scratch) : floats(0) {
      const auto take = [&](int64_t count) {
        float* piece = scratch + floats;
        floats += up_to(count, kLanes);
        return piece;
      };
      const int64_t dim = b.sizes.padded_dim, words = b.sizes.row_words;
      k_columns = take(b.padded_keys * b.steps);
      v_columns = take(b.padded_keys * b.steps);
      k_depth = take(b.padded_keys / W::kUnit * dim);
      q_rows = take(b.padded_queries * words);
      d_out_rows = take(b.padded_queries * words);
      q_depth = take(b.padded_queries / W::kUnit * dim);
      d_out_depth = take(b.padded_queries / W::kUnit * dim);
      dq = take(b.padded_queries * dim);
      top = take(b.padded_queries);
      inverse = take(b.padded_queries);
      delta = take(up_to(b.padded_queries, kPanel));
      scores = take(kRows * kKeys);
      d_weights = take(kRows * kKeys);
      weights_T = take(kQueries / W::kUnit * kKeys);
      d_scores_T = take(kQueries / W::kUnit * kKeys);
      d_scores = take(kRows * kKeys / W::kUnit);
      dk = take(kKeys * dim);
      dv = take(kKeys * dim);
      sums = take(b.part_floats());
      ranges = reinterpret_cast<Range*>(take(b.padded_queries * static_cast<int64_t>(sizeof(Range) / sizeof(float))));
    }
  };

  int64_t scratch_floats() const { return State(*this, nullptr).floats; }

  void load_keys(State& s, int64_t b, int64_t kv_head) const;
  void load_delta(State& s, int64_t b, int64_t head, int64_t first) const;
  void load_queries(State& s, int64_t b, int64_t head) const;
  void step_queries(State& s, int64_t row, int64_t offset, int64_t first_key, float slope) const;
  void step_keys(State& s, int64_t first, int64_t count, int64_t first_key, Range seen) const;
  void run_head(State& s, float* sums, bool is_first, float slope) const;
  void store(const float* rows, int64_t parts, int64_t part_stride, float factor, void* target, int64_t b,
             int64_t count, int64_t heads, int64_t head) const;
  void store_keys(const float* parts, int64_t num_parts, int64_t item) const;
  void run(float* scratch, int64_t begin, int64_t end) const;
  void sum_parts(int64_t begin, int64_t end) const;
};

template <class W, class T>
inline void Backward<W, T>::load_keys(State& s, int64_t b, int64_t kv_head) const {
  // The place of the queries' rows is free yet, and holds kPanel rows: kPanel <= kQueries.
  pack_columns<W, T>(sizes, p.k, b, kv_head, p.num_keys, padded_keys, s.k_columns, s.q_rows);
  pack_columns<W, T>(sizes, p.v, b, kv_head, p.num_keys, padded_keys, s.v_columns, s.q_rows);
  pack_depth<W, T>(sizes, p.k, b, kv_head, p.num_keys, padded_keys, s.k_depth);
}

// delta = d_out . out of kPanel queries, added up as a product d_out . v is: where a query sees one key alone, out is
// v, and the gradient of its score is zero to the last bit. dk, dv and dq are free yet, and serve as scratch.
template <class W, class T>
inline void Backward<W, T>::load_delta(State& s, int64_t b, int64_t head, int64_t first) const {
  pack_panel<W, T>(sizes, g.d_out, b, head, first, p.num_queries, s.dk, s.dq);
  pack_panel<W, T>(sizes, g.out, b, head, first, p.num_queries, s.dv, s.dq);
  for (int64_t i = 0; i < kPanel; i += kLanes) {
    f32x16 sum{}, chain{};
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t place = step * kPanel + i;
      chain = W::multiply_add(chain, Fp32::load(s.dk + place), Fp32::load(s.dv + place));
      if ((step + 1) % W::kChain == 0) sum += chain, chain = f32x16{};
    }
    Fp32::store(s.delta + first + i, sum + chain);
  }
}

template <class W, class T>
inline void Backward<W, T>::load_queries(State& s, int64_t b, int64_t head) const {
  pack_rows<W, T>(sizes, p.q, b, head, 0, p.num_queries, padded_queries, s.q_rows);
  pack_rows<W, T>(sizes, g.d_out, b, head, 0, p.num_queries, padded_queries, s.d_out_rows);
  pack_depth<W, T>(sizes, p.q, b, head, p.num_queries, padded_queries, s.q_depth);
  pack_depth<W, T>(sizes, g.d_out, b, head, p.num_queries, padded_queries, s.d_out_depth);
  for (int64_t first = 0; first < p.num_queries; first += kPanel) load_delta(s, b, head, first);
  zero(s.dq, 0, padded_queries * sizes.padded_dim);
  for (int64_t i = 0; i < p.num_queries; ++i) {
    const int64_t index = (b * p.heads + head) * p.num_queries + i;
    s.ranges[i] = range_of(p, b, i);
    s.top[i] = g.stats[2 * index];
    s.inverse[i] = g.stats[2 * index + 1];
    if (s.inverse[i] != 1.0f) {  // not one key alone: then the sum with the least rounding
      const auto *out = row_of<T>(g.out, b, i, head), *d_out = row_of<T>(g.d_out, b, i, head);
      f32x16 sum{};
      for (int64_t d = 0; d < p.dim; d += kLanes)
        sum += load_up_to<T>(out + d, p.dim - d) * load_up_to<T>(d_out + d, p.dim - d);
      s.delta[i] = sum_lanes(sum);
    }
    if (g.d_lse != nullptr && !s.ranges[i].empty()) s.delta[i] -= g.d_lse[index];
  }
  for (int64_t i = p.num_queries; i < padded_queries; ++i) {
    s.ranges[i] = {0, 0};
    s.top[i] = s.inverse[i] = s.delta[i] = 0.0f;
  }
}

// Weights and gradients of the scores of kRows queries from `row` and a block of keys, into the tiles; adds to dq.
// `offset` is the queries' place in the tiles.
template <class W, class T>
inline void Backward<W, T>::step_queries(State& s, int64_t row, int64_t offset, int64_t first_key, float slope) const {
  const Range hull = hull_of(s.ranges + row, kRows, first_key, kKeys);
  float* weights_T = s.weights_T + offset / W::kUnit * kKeys;
  float* d_scores_T = s.d_scores_T + offset / W::kUnit * kKeys;
  const Range vectors = hull.empty() ? Range{0, 0} : Range{hull.first / kLanes * kLanes, up_to(hull.last, kLanes)};
  float* const tiles[] = {weights_T, d_scores_T};
  for (int64_t i = 0; i < kRows / W::kUnit; ++i)
    for (float* tile : tiles) {
      zero(tile + i * kKeys, 0, vectors.first);
      zero(tile + i * kKeys, vectors.last, kKeys);
    }
  if (hull.empty()) return;
  for (int64_t panel = hull.first / kPanel * kPanel; panel < hull.last; panel += kPanel) {
    const int64_t place = (first_key + panel) * steps;
    dim_product<W>(s.q_rows + row * sizes.row_words, sizes.row_words, s.k_columns + place, steps, s.scores + panel,
                   kKeys);
    dim_product<W>(s.d_out_rows + row * sizes.row_words, sizes.row_words, s.v_columns + place, steps,
                   s.d_weights + panel, kKeys);
  }
  const bool has_slope = p.slopes != nullptr;
  for (int64_t r = 0; r < kRows; ++r) {
    const Range seen = s.ranges[row + r];
    const Range own{max_of(seen.first - first_key, 0), min_of(seen.last - first_key, kKeys)};
    float* scores = s.scores + r * kKeys;
    if (has_slope)
      add_slope(scores, vectors.first, vectors.last, first_key, p.num_keys - p.num_queries + row + r, p.scale, slope);
    differentiate(scores, s.d_weights + r * kKeys, own, vectors, has_slope ? kLog2E : p.scale * kLog2E, s.top[row + r],
                  s.inverse[row + r], s.delta[row + r]);
  }
  W::pack_transposed(s.scores, kKeys, weights_T, kKeys, vectors.first, vectors.last);
  W::pack_transposed(s.d_weights, kKeys, d_scores_T, kKeys, vectors.first, vectors.last);
  const float* d_scores = W::pack_weights(s.d_weights, s.d_scores, kKeys, vectors.first, vectors.last);
  const int64_t begin = hull.first / W::kUnit, end = (hull.last + W::kUnit - 1) / W::kUnit;
  depth_product<W, false, Start::kSum>(sizes, d_scores + begin, kKeys / W::kUnit, s.k_depth, padded_keys / W::kUnit,
                                       first_key / W::kUnit + begin, first_key / W::kUnit + end,
                                       s.dq + row * sizes.padded_dim);
}

// Adds the block of queries `first`.. whose tiles are there to dk and dv of the block of keys.
template <class W, class T>
inline void Backward<W, T>::step_keys(State& s, int64_t first, int64_t count, int64_t first_key, Range seen) const {
  for (int64_t key = seen.first / kRows * kRows; key < seen.last; key += kRows) {
    int64_t begin = 0, end = count;  // queries that see one of these keys
    const auto sees = [&](int64_t i) {
      const Range& range = s.ranges[first + i];
      return range.first < first_key + key + kRows && range.last > first_key + key;
    };
    while (begin < end && !sees(begin)) ++begin;
    while (end > begin && !sees(end - 1)) --end;
    if (begin == end) continue;
    begin /= W::kUnit;
    end = (end + W::kUnit - 1) / W::kUnit;
    const int64_t from = first / W::kUnit + begin, to = first / W::kUnit + end, total = padded_queries / W::kUnit;
    depth_product<W, true, Start::kSum>(sizes, s.weights_T + begin * kKeys + key, kKeys, s.d_out_depth, total, from,
                                        to, s.dv + key * sizes.padded_dim);
    depth_product<W, true, Start::kSum>(sizes, s.d_scores_T + begin * kKeys + key, kKeys, s.q_depth, total, from, to,
                                        s.dk + key * sizes.padded_dim);
  }
}

template <class W, class T>
inline void Backward<W, T>::run_head(State& s, float* sums, bool is_first, float slope) const {
  for (int64_t first_key = 0; first_key < padded_keys; first_key += kKeys) {
    zero(s.dk, 0, kKeys * sizes.padded_dim);
    zero(s.dv, 0, kKeys * sizes.padded_dim);
    for (int64_t first = 0; first < p.num_queries; first += kQueries) {
      const int64_t count = up_to(min_of(kQueries, p.num_queries - first), kRows);
      const Range seen = hull_of(s.ranges + first, count, first_key, kKeys);
      if (seen.empty()) continue;
      for (int64_t offset = 0; offset < count; offset += kRows)
        step_queries(s, first + offset, offset, first_key, slope);
      step_keys(s, first, count, first_key, seen);
    }
    const int64_t size = kKeys * sizes.padded_dim;
    float *dk = sums + first_key * sizes.padded_dim, *dv = dk + sums_floats();
    for (int64_t i = 0; i < size; i += kLanes) {
      Fp32::store(dk + i, is_first ? Fp32::load(s.dk + i) : Fp32::load(dk + i) + Fp32::load(s.dk + i));
      Fp32::store(dv + i, is_first ? Fp32::load(s.dv + i) : Fp32::load(dv + i) + Fp32::load(s.dv + i));
    }
  }
}

// target[i, head] = factor * (rows of `parts` pieces, `part_stride` apart, added in order), for `count` tokens.
template <class W, class T>
inline void Backward<W, T>::store(const float* rows, int64_t parts, int64_t part_stride, float factor, void* target,
                                  int64_t b, int64_t count, int64_t heads, int64_t head) const {
  using Stored = typename T::Stored;
  for (int64_t i = 0; i < count; ++i) {
    Stored* to = static_cast<Stored*>(target) + ((b * count + i) * heads + head) * p.dim;
    for (int64_t d = 0; d < p.dim; d += kLanes) {
      const float* from = rows + i * sizes.padded_dim + d;
      f32x16 sum = Fp32::load(from);
      for (int64_t part = 1; part < parts; ++part) sum += Fp32::load(from + part * part_stride);
      store_up_to<T>(to + d, sum * broadcast(factor), p.dim - d);
    }
  }
}

template <class W, class T>
inline void Backward<W, T>::store_keys(const float* parts, int64_t num_parts, int64_t item) const {
  const int64_t b = item / p.kv_heads, head = item % p.kv_heads;
  store(parts, num_parts, part_floats(), p.scale, g.dk, b, p.num_keys, p.kv_heads, head);
  store(parts + sums_floats(), num_parts, part_floats(), 1.0f, g.dv, b, p.num_keys, p.kv_heads, head);
}

template <class W, class T>
inline void Backward<W, T>::run(float* scratch, int64_t begin, int64_t end) const {
  State s(*this, scratch);
  const int64_t num_parts = group / g.heads_per_part;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t key_item = item / num_parts, b = key_item / p.kv_heads, kv_head = key_item % p.kv_heads;
    float* sums = num_parts == 1 ? s.sums : g.parts + item * part_floats();
    load_keys(s, b, kv_head);
    for (int64_t i = 0; i < g.heads_per_part; ++i) {
      const int64_t head = kv_head * group + item % num_parts * g.heads_per_part + i;
      load_queries(s, b, head);
      run_head(s, sums, i == 0, p.slopes == nullptr ? 0.0f : p.slopes[head]);
      store(s.dq, 1, 0, p.scale, g.dq, b, p.num_queries, p.heads, head);
    }
    if (num_parts == 1) store_keys(sums, 1, key_item);
  }
}

template <class W, class T>
inline void Backward<W, T>::sum_parts(int64_t begin, int64_t end) const {
  const int64_t num_parts = group / g.heads_per_part;
  for (int64_t item = begin; item < end; ++item)
    store_keys(g.parts + item * num_parts * part_floats(), num_parts, item);
}

}  // namespace
