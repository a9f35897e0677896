// Flash attention on the CPU: what binding_cpu.cpp calls. megatron_lite/ops/attention_kernels.py has the equations.
#pragma once

#include "common/format.h"

namespace ml {

// A tensor [batch, tokens, heads, dim] whose last dimension is contiguous; strides in numbers.
struct AttentionTensor {
  const void* data;
  int64_t batch_stride, token_stride, head_stride;
};

struct AttentionProblem {
  Format format;
  int64_t batch, num_queries, num_keys, heads, kv_heads, dim;
  float scale;
  bool causal;
  int64_t window;         // 0: none
  const int32_t* bounds;  // [batch, num_queries, 2] or null
  const float* slopes;    // [heads] or null
  AttentionTensor q, k, v;
};

struct AttentionGradients {
  AttentionTensor d_out, out;
  const float* d_lse;  // [batch, heads, num_queries] or null
  const float* stats;  // as forward wrote them
  void *dq, *dk, *dv;  // contiguous, like q, k, v
  int64_t heads_per_part;  // query heads whose gradients of keys and values one item adds up; divides heads / kv_heads
  float* parts;            // where that is not all of a group: num_items x part_floats(), for `sum_parts`
};

// Scratch memory is 64-byte aligned, one piece for each thread, and holds what the function named next to it takes.
struct AttentionCpu {
  // All keys and values, laid out for the products: in `forward` every query block reads them.
  int64_t (*packed_floats)(const AttentionProblem&);
  int64_t (*pack_scratch)(const AttentionProblem&);
  // Key heads begin..end of batch * kv_heads.
  void (*pack)(const AttentionProblem&, float* packed, float* scratch, int64_t begin, int64_t end);

  int64_t (*num_query_blocks)(const AttentionProblem&);
  int64_t (*forward_scratch)(const AttentionProblem&);
  // Items begin..end of batch * heads * num_query_blocks. Writes out (contiguous, like q), lse[batch, heads,
  // num_queries] and stats[batch, heads, num_queries, 2]: the largest score, before `scale` where there are no slopes,
  // and one over the sum of the exponentials of what the scores are below it. The backward computes the very same
  // exponentials from them; with lse alone, whose rounding grows with the scores, it could not.
  void (*forward)(const AttentionProblem&, const float* packed, void* out, float* lse, float* stats, float* scratch,
                  int64_t begin, int64_t end);

  int64_t (*part_floats)(const AttentionProblem&);
  int64_t (*backward_scratch)(const AttentionProblem&);
  // Items begin..end of batch * heads / heads_per_part.
  void (*backward)(const AttentionProblem&, const AttentionGradients&, float* scratch, int64_t begin, int64_t end);
  // Key heads begin..end of batch * kv_heads: dk and dv from the parts, added in the order of the heads.
  void (*sum_parts)(const AttentionProblem&, const AttentionGradients&, int64_t begin, int64_t end);
};

struct AttentionCpus {
  AttentionCpu fp32, bf16, fp16;
};

extern const AttentionCpus attention_portable, attention_avx2, attention_avx512;
extern const AttentionCpu attention_avx512bf16;  // for bf16

}  // namespace ml
