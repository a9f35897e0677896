// Flash attention on CUDA, as operators on tensors.

#include <math.h>

#include <optional>

#include "attention/cuda.h"
#include "common/cuda_error.h"
#include "common/tensors.h"

using ml::ScalarType;
using ml::Tensor;

namespace {

using Optional = std::optional<Tensor>;

void check_cuda(int code) { ml::check_cuda("attention", code); }

bool has_shape(const Tensor& t, std::initializer_list<int64_t> sizes) {
  if (t.dim() != static_cast<int64_t>(sizes.size())) return false;
  int64_t i = 0;
  for (const int64_t size : sizes)
    if (t.size(i++) != size) return false;
  return true;
}

const Tensor* pointer_of(const Optional& t) { return t.has_value() ? &*t : nullptr; }

// The kernels read any strides but for the last dimension, which is contiguous.
Tensor readable(const Tensor& t) { return t.stride(3) == 1 ? t : torch::stable::contiguous(t); }

ml::CudaHeads heads_of(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

const float* floats_of(const Optional& t) {
  return t.has_value() ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

void check_shapes(const Tensor& q, const Tensor& k, const Tensor& v) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && has_shape(v, {q.size(0), k.size(1), k.size(2), q.size(3)}) &&
                      k.size(0) == q.size(0) && k.size(3) == q.size(3) && k.size(2) > 0 && q.size(2) % k.size(2) == 0,
                  "attention takes q[B, Sq, H, D] and k, v[B, Sk, Hk, D], H a multiple of Hk");
  STD_TORCH_CHECK(q.size(3) > 0 && q.size(3) <= ml::kCudaAttentionMaxDim, "attention on CUDA takes D from 1 to ",
                  ml::kCudaAttentionMaxDim);
  STD_TORCH_CHECK((q.scalar_type() == ScalarType::BFloat16 || q.scalar_type() == ScalarType::Half) &&
                      k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                  "attention on CUDA takes q, k and v in bf16, or in fp16");
  STD_TORCH_CHECK(std::max({q.size(0), q.size(1), q.size(2), k.size(1)}) < 1 << 30,
                  "attention on CUDA takes fewer than 2^30 rows, heads, queries and keys");
}

// What the kernels are given, with the tensors that it points into.
struct Inputs {
  Tensor q, k, v;
  Optional bounds, slopes, spans;
  ml::CudaAttentionProblem problem;

  Inputs(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, const Optional& bounds_any,
         const Optional& slopes_any, double scale, bool causal, int64_t window, int64_t shared_bytes)
      : q(q_any), k(k_any), v(v_any) {
    check_shapes(q, k, v);
    ml::check_one_device("attention", {&q, &k, &v, pointer_of(bounds_any), pointer_of(slopes_any)});
    STD_TORCH_CHECK(isfinite(scale) && window >= 0, "attention takes a finite scale and a window >= 0");
    STD_TORCH_CHECK(shared_bytes >= ml::kCudaAttentionSharedBytes, "attention on CUDA takes devices with ",
                    ml::kCudaAttentionSharedBytes, " bytes of shared memory for a block, this one has ", shared_bytes);
    q = readable(q), k = readable(k), v = readable(v);
    const auto as_int = [](int64_t n) { return static_cast<int>(n); };
    problem = {as_int(q.size(0)), as_int(q.size(1)), as_int(k.size(1)), as_int(q.size(2)), as_int(k.size(2)),
               as_int(q.size(3)), static_cast<float>(scale), causal,
               window < k.size(1) ? as_int(window) : 0,  // one of all keys or more hides none
               nullptr, nullptr, nullptr, as_int(shared_bytes)};
    if (bounds_any.has_value()) {
      STD_TORCH_CHECK(has_shape(*bounds_any, {q.size(0), q.size(1), 2}) && bounds_any->scalar_type() == ScalarType::Int,
                      "attention takes bounds int32[B, Sq, 2]");
      bounds = torch::stable::contiguous(*bounds_any);
      const int64_t num_spans = (q.size(1) + ml::kCudaAttentionSpan - 1) / ml::kCudaAttentionSpan;
      spans = torch::stable::new_empty(q, {q.size(0), num_spans, 4}, ScalarType::Int);
      problem.bounds = static_cast<const int32_t*>(bounds->const_data_ptr());
      problem.spans = static_cast<int32_t*>(spans->mutable_data_ptr());
    }
    if (slopes_any.has_value()) {
      STD_TORCH_CHECK(has_shape(*slopes_any, {q.size(2)}) && slopes_any->scalar_type() == ScalarType::Float,
                      "attention takes slopes fp32[H]");
      slopes = torch::stable::contiguous(*slopes_any);
      problem.slopes = floats_of(slopes);
    }
  }

  bool empty() const { return problem.batch == 0 || problem.heads == 0; }
  Tensor new_queries() const {
    return torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2), q.size(3)}, q.scalar_type());
  }
  Tensor new_keys() const {
    return torch::stable::new_empty(k, {k.size(0), k.size(1), k.size(2), k.size(3)}, q.scalar_type());
  }
  Tensor new_rows() const {
    return torch::stable::new_empty(q, {q.size(0), q.size(2), q.size(1)}, ScalarType::Float);
  }
  bool takes_rows(const Tensor& t) const {
    return has_shape(t, {q.size(0), q.size(2), q.size(1)}) && t.scalar_type() == ScalarType::Float;
  }
  bool takes_queries(const Tensor& t) const {
    return has_shape(t, {q.size(0), q.size(1), q.size(2), q.size(3)}) && t.scalar_type() == q.scalar_type();
  }
};

// `shared_bytes` is what a block can have on the device. `stream` is the cudaStream_t as an integer. Asking for either
// takes CUDA headers, or torch 2.13's ABI for the stream.
std::tuple<Tensor, Tensor> attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& bounds,
                                          const Optional& slopes, double scale, bool causal, int64_t window,
                                          int64_t shared_bytes, int64_t stream) {
  const Inputs in(q, k, v, bounds, slopes, scale, causal, window, shared_bytes);
  Tensor out = in.new_queries(), lse = in.new_rows();
  if (!in.empty() && in.problem.queries > 0)
    check_cuda(ml::attention_forward_cuda(ml::format_of(q), in.problem, heads_of(in.q), heads_of(in.k), heads_of(in.v),
                                          out.mutable_data_ptr(), static_cast<float*>(lse.mutable_data_ptr()),
                                          reinterpret_cast<void*>(stream)));
  return {out, lse};
}

// The sums always run in one order, so `deterministic` changes nothing.
std::tuple<Tensor, Tensor, Tensor> attention_backward_cuda(const Tensor& d_out_any, const Tensor& q, const Tensor& k,
                                                           const Tensor& v, const Tensor& out_any,
                                                           const Tensor& lse_any, const Optional& d_lse_any,
                                                           const Optional& bounds, const Optional& slopes,
                                                           double scale, bool causal, int64_t window, bool,
                                                           int64_t shared_bytes, int64_t stream) {
  const Inputs in(q, k, v, bounds, slopes, scale, causal, window, shared_bytes);
  ml::check_one_device("attention", {&q, &d_out_any, &out_any, &lse_any, pointer_of(d_lse_any)});
  STD_TORCH_CHECK(in.takes_queries(d_out_any) && in.takes_queries(out_any), "attention takes d_out and out like q");
  STD_TORCH_CHECK(in.takes_rows(lse_any) && (!d_lse_any.has_value() || in.takes_rows(*d_lse_any)),
                  "attention takes lse and d_lse fp32[B, H, Sq]");
  const Tensor d_out = readable(d_out_any), out = readable(out_any), lse = torch::stable::contiguous(lse_any);
  Optional d_lse;
  if (d_lse_any.has_value()) d_lse = torch::stable::contiguous(*d_lse_any);
  Tensor delta = in.new_rows(), dq = in.new_queries(), dk = in.new_keys(), dv = in.new_keys();
  if (in.empty()) return {dq, torch::stable::zero_(dk), torch::stable::zero_(dv)};
  const ml::CudaAttentionGradients gradients{dq.mutable_data_ptr(), dk.mutable_data_ptr(), dv.mutable_data_ptr(),
                                             static_cast<float*>(delta.mutable_data_ptr())};
  check_cuda(ml::attention_backward_cuda(ml::format_of(q), in.problem, heads_of(d_out), heads_of(in.q), heads_of(in.k),
                                         heads_of(in.v), heads_of(out), static_cast<const float*>(lse.const_data_ptr()),
                                         floats_of(d_lse), gradients, reinterpret_cast<void*>(stream)));
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_lite_cuda, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? bounds, Tensor? slopes, float scale, bool causal, int window, "
      "int shared_bytes, int stream) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? d_lse, "
      "Tensor? bounds, Tensor? slopes, float scale, bool causal, int window, bool deterministic, int shared_bytes, "
      "int stream) -> (Tensor dq, Tensor dk, Tensor dv)");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_lite_cuda, ML_CUDA_KEY, m) {
  m.impl("attention", TORCH_BOX(&attention_cuda));
  m.impl("attention_backward", TORCH_BOX(&attention_backward_cuda));
}
