// Flash attention on CUDA: what binding_cuda.cpp calls. Plain C types, so that the .cu files need no header of torch.
#pragma once

#include "common/format.h"

namespace ml {

// Padded head dimensions that the kernels are compiled for; the largest is the largest that they take.
constexpr int kCudaAttentionMaxDim = 256;
// Queries whose intervals of visible keys are summed up in one entry of `spans`.
constexpr int kCudaAttentionSpan = 32;
// Shared memory that a block can have on every device of sm_80 and newer: 99 KiB on sm_86, sm_89 and sm_120. Tiles that
// take more (163 KiB on sm_80, 227 on sm_90) have smaller ones beside them.
constexpr int kCudaAttentionSharedBytes = 99 * 1024;

// A tensor [B, S, H, D]: its first number, and the distances between batches, tokens and heads, in numbers. The D
// numbers of a head lie side by side.
struct CudaHeads {
  const void* data;
  int64_t batch, token, head;
};

struct CudaAttentionProblem {
  int batch, queries, keys, heads, key_heads, dim;
  float scale;
  bool causal;
  int window;             // 0: none
  const int32_t* bounds;  // [B, Sq, 2], or null
  const float* slopes;    // [H], or null
  int32_t* spans;         // scratch [B, ceil(Sq / kCudaAttentionSpan), 4]; unused without bounds
  int shared_bytes;       // that a block can have on the device; at least kCudaAttentionSharedBytes
};

// out[B, Sq, H, D] and lse[B, H, Sq] from q, k and v. bf16 and fp16. All pointers are on the current device. Returns a
// CUDA error code; 0 is success.
int attention_forward_cuda(Format format, const CudaAttentionProblem& problem, const CudaHeads& q, const CudaHeads& k,
                           const CudaHeads& v, void* out, float* lse, void* stream);

struct CudaAttentionGradients {
  void *dq, *dk, *dv;  // [B, Sq, H, D], [B, Sk, Hk, D] twice
  float* delta;        // scratch [B, H, Sq]
};

// The gradients of q, k and v; d_lse[B, H, Sq] may be null.
int attention_backward_cuda(Format format, const CudaAttentionProblem& problem, const CudaHeads& d_out,
                            const CudaHeads& q, const CudaHeads& k, const CudaHeads& v, const CudaHeads& out,
                            const float* lse, const float* d_lse, const CudaAttentionGradients& gradients,
                            void* stream);

}  // namespace ml
