// Sums of squares over blocks on CUDA: what binding_cuda.cpp calls. No header of torch.
#pragma once

#include "common/format.h"

namespace ml {

// sums[b] = sum over block b of 256 values^2, for blocks 0..blocks, by the tree of cpu.cpp. Returns a CUDA error code.
int block_squares_cuda(Format format, const void* values, double* sums, int64_t blocks, void* stream);

}  // namespace ml
