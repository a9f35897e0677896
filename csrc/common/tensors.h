// What the files that know tensors share (binding_cpu.cpp and binding_cuda.cpp of each op): they register the kernels
// as operators through torch's stable ABI (torch 2.11 and up). Autograd, fake kernels and the choice between devices
// are registered in Python (megatron_lite/ops), on top of these.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <initializer_list>
#include <tuple>
#include <vector>

#include "common/format.h"

// The device that binding_cuda.cpp registers for. The tests run the same sources on the CPU, emulated.
#ifndef ML_CUDA_KEY
#define ML_CUDA_KEY CUDA
#endif

namespace ml {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Format format_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Format::kFp32;
    case ScalarType::BFloat16: return Format::kBf16;
    case ScalarType::Half: return Format::kFp16;
    default: STD_TORCH_CHECK(false, "the kernel takes fp32, bf16 and fp16");
  }
}

// All are on the device of the first; null is passed over. The dispatcher only sees that one of them is on a GPU.
inline void check_one_device(const char* op, std::initializer_list<const Tensor*> tensors) {
  const auto device = (*tensors.begin())->device();
  for (const Tensor* t : tensors)
    STD_TORCH_CHECK(t == nullptr || t->device() == device, op, " takes tensors on one device");
}

inline Tensor rows_like(const Tensor& x, int64_t rows) {
  return torch::stable::new_empty(x, {rows}, ScalarType::Float);
}

// From here on the first write to each ordinary page of 4 KiB, which stops for the kernel, costs more than the writing.
constexpr int64_t kHugePagesFromBytes = int64_t(8) << 20;

// Asks for huge pages in `t`, which nobody has written yet, if it is large. Advice: the system may not follow it.
inline void use_huge_pages(const Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const int64_t bytes = t.numel() * t.element_size();
  if (bytes < kHugePagesFromBytes) return;
  constexpr uintptr_t kHugePage = uintptr_t(2) << 20;
  const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// An empty tensor like `x`, on huge pages if it is large.
inline Tensor fresh_like(const Tensor& x) {
  const Tensor fresh = torch::stable::empty_like(x);
  use_huge_pages(fresh);
  return fresh;
}

constexpr int64_t kCpuNumbersPerTask = 1 << 15;  // below this, a second thread costs more than it brings

inline int64_t grain(int64_t numbers_per_item) {
  return std::max<int64_t>(1, kCpuNumbersPerTask / std::max<int64_t>(1, numbers_per_item));
}

}  // namespace ml
