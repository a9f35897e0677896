// Launches of more blocks than a grid takes, and than 32 bits hold, for test_cuda_kernels.py. Each returns its error
// code. There is no memory behind the pointers: no kernel may start.

#include "adamw/cuda.h"
#include "block_squares/cuda.h"
#include "cross_entropy/cuda.h"
#include "gelu/cuda.h"
#include "rms_norm/cuda.h"
#include "rotary/cuda.h"
#include "swiglu/cuda.h"

#define CONTROL extern "C" __attribute__((visibility("default"))) int

namespace {

constexpr auto kFp32 = ml::Format::kFp32;
constexpr int64_t kTooMany = (int64_t(1) << 32) + 1;

}  // namespace

CONTROL grid_rms_norm() {
  ml::NormForwardCuda in{};
  in.rows = kTooMany, in.dim = 1;
  return ml::rms_norm_forward_cuda(kFp32, kFp32, in, nullptr);
}

CONTROL grid_rms_norm_backward() {
  ml::NormBackwardCuda in{};
  in.rows = kTooMany * ml::kCudaRowsPerBlock, in.dim = 1;
  return ml::rms_norm_backward_cuda(kFp32, kFp32, in, nullptr);
}

CONTROL grid_cross_entropy() {
  return ml::cross_entropy_statistics_cuda({kFp32, 1, 0, 1, nullptr, 0}, nullptr, {}, kTooMany, nullptr);
}

CONTROL grid_swiglu() {
  return ml::swiglu_forward_cuda(kFp32, ml::Activation::kSilu, nullptr, nullptr, kTooMany, 1, nullptr);
}

CONTROL grid_swiglu_columns() {
  return ml::swiglu_forward_cuda(kFp32, ml::Activation::kSilu, nullptr, nullptr, 1, kTooMany << 10, nullptr);
}

CONTROL grid_rotary() {
  ml::RotaryHeads one{};
  one.count = 1;
  return ml::rotary_cuda(kFp32, {1, kTooMany, 2, 1, 0, false, 1.0f}, one, one, nullptr, nullptr, nullptr);
}

CONTROL grid_gelu() {
  return ml::gelu_forward_cuda(kFp32, ml::Activation::kGelu, nullptr, nullptr, kTooMany << 10, nullptr);
}

CONTROL grid_block_squares() { return ml::block_squares_cuda(kFp32, nullptr, nullptr, kTooMany << 5, nullptr); }

CONTROL grid_adamw() {
  ml::AdamWMemory memory{};
  return ml::adamw_cuda(memory, {}, 0.0f, 0, kTooMany << 12, nullptr);
}
