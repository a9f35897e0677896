// Cross-entropy over a shard of a vocabulary on the CPU: what binding_cpu.cpp calls.
#pragma once

#include "cross_entropy/shard.h"

namespace ml {

struct CrossEntropyCpu {
  // Statistics of rows begin..end.
  void (*statistics)(const CrossEntropyShard& shard, const void* logits, const CrossEntropyStatistics& statistics,
                     int64_t begin, int64_t end);
  // Rows begin..end of the gradient; it may lie over the logits.
  void (*gradient)(const CrossEntropyShard& shard, const void* logits, const CrossEntropySlope& slope, void* gradient,
                   int64_t begin, int64_t end);
};

extern const CrossEntropyCpu cross_entropy_portable, cross_entropy_avx2, cross_entropy_avx512,
    cross_entropy_avx512bf16;

}  // namespace ml
