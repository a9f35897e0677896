// Cross-entropy over a shard of a vocabulary on CUDA: what binding_cuda.cpp calls. Plain C types, so that cuda.cu needs
// no header of torch. All pointers are on the current device. Both return a CUDA error code; 0 is success.
#pragma once

#include "cross_entropy/shard.h"

namespace ml {

int cross_entropy_statistics_cuda(const CrossEntropyShard& shard, const void* logits,
                                  const CrossEntropyStatistics& statistics, int64_t rows, void* stream);

// `gradient` may lie over the logits.
int cross_entropy_gradient_cuda(const CrossEntropyShard& shard, const void* logits, const CrossEntropySlope& slope,
                                void* gradient, int64_t rows, void* stream);

}  // namespace ml
