// Rotary embedding on CUDA, as operators on tensors.

#include "common/cuda_error.h"
#include "common/tensors.h"
#include "rotary/cuda.h"
#include "rotary/tensors.h"

using ml::Tensor;

namespace {

// `stream` is the cudaStream_t as an integer: reading the current stream takes torch 2.13's ABI, or CUDA headers.
void rotary_cuda(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool interleaved, bool inverse,
                 Tensor& q_out, Tensor& k_out, int64_t stream) {
  const ml::RotaryShape shape = ml::rotary_shape(q, k, cos, sin, interleaved, inverse);
  const ml::RotaryHeads q_heads = ml::rotary_heads(q, q_out), k_heads = ml::rotary_heads(k, k_out);
  ml::check_cuda("rotary", ml::rotary_cuda(ml::format_of(q), shape, q_heads, k_heads,
                                           static_cast<const float*>(cos.const_data_ptr()),
                                           static_cast<const float*>(sin.const_data_ptr()),
                                           reinterpret_cast<void*>(stream)));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_lite_cuda, m) {
  m.def(
      "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool inverse, Tensor(a!) q_out, "
      "Tensor(b!) k_out, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_lite_cuda, ML_CUDA_KEY, m) {
  m.impl("rotary", TORCH_BOX(&rotary_cuda));
}
