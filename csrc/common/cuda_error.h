// Errors of CUDA, for the files that know tensors. Defined in rms_norm/cuda.cu.
#pragma once

#include "common/tensors.h"

namespace ml {

const char* cuda_error_string(int code);

inline void check_cuda(const char* op, int code) {
  STD_TORCH_CHECK(code == 0, op, " on CUDA: ", cuda_error_string(code));
}

}  // namespace ml
