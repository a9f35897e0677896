// The table of functions of an instruction set, made of Forward and Backward for the words that it multiplies.
#pragma once

#include "attention/cpu_backward.h"
#include "attention/cpu_forward.h"

namespace {

template <class W, class T>
struct Table {
  static int64_t packed_floats(const ml::AttentionProblem& p) {
    return p.batch * p.kv_heads * Forward<W, T>(p).head_floats();
  }
  static int64_t pack_scratch(const ml::AttentionProblem& p) { return kPanel * Sizes<W>(p).row_words; }
  static void pack(const ml::AttentionProblem& p, float* packed, float* scratch, int64_t begin, int64_t end) {
    Forward<W, T>(p).pack(packed, scratch, begin, end);
  }
  static int64_t num_query_blocks(const ml::AttentionProblem& p) { return Forward<W, T>(p).query_blocks(); }
  static int64_t forward_scratch(const ml::AttentionProblem& p) { return Forward<W, T>(p).scratch_floats(); }
  static void forward(const ml::AttentionProblem& p, const float* packed, void* out, float* lse, float* stats,
                      float* scratch, int64_t begin, int64_t end) {
    Forward<W, T>(p).run(packed, out, lse, stats, scratch, begin, end);
  }
  static int64_t part_floats(const ml::AttentionProblem& p) { return Backward<W, T>(p, {}).part_floats(); }
  static int64_t backward_scratch(const ml::AttentionProblem& p) { return Backward<W, T>(p, {}).scratch_floats(); }
  static void backward(const ml::AttentionProblem& p, const ml::AttentionGradients& g, float* scratch, int64_t begin,
                       int64_t end) {
    Backward<W, T>(p, g).run(scratch, begin, end);
  }
  static void sum_parts(const ml::AttentionProblem& p, const ml::AttentionGradients& g, int64_t begin, int64_t end) {
    Backward<W, T>(p, g).sum_parts(begin, end);
  }
  static constexpr ml::AttentionCpu functions = {packed_floats,    pack_scratch, pack,        num_query_blocks,
                                                 forward_scratch,  forward,      part_floats, backward_scratch,
                                                 backward,         sum_parts};
};

}  // namespace
