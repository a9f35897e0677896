// Flash attention on the CPU, as operators on tensors.

#include <atomic>
#include <cmath>
#include <memory>
#include <new>
#include <optional>

#include "attention/cpu.h"
#include "common/instruction_set.h"
#include "common/tensors.h"

using ml::ScalarType;
using ml::Tensor;

namespace {

using Optional = std::optional<Tensor>;

const ml::AttentionCpu& kernels_for(ml::Format format, int64_t isa) {
#ifdef ML_WITH_AVX512BF16
  if (format == ml::Format::kBf16 && ml::instruction_set(isa) >= 3) return ml::attention_avx512bf16;
#endif
  const ml::AttentionCpus& all = ML_KERNELS(attention, isa);
  return format == ml::Format::kFp32 ? all.fp32 : format == ml::Format::kBf16 ? all.bf16 : all.fp16;
}

// The kernels read any strides but for the last dimension, which is contiguous.
Tensor readable(const Tensor& t) { return t.stride(3) == 1 ? t : torch::stable::contiguous(t); }

ml::AttentionTensor view_of(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

bool is_like(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim() || a.scalar_type() != b.scalar_type()) return false;
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

// The tensors that a problem points into, and the problem.
struct Inputs {
  Tensor q, k, v;
  Optional bounds, slopes;
  ml::AttentionProblem problem;

  Inputs(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, const Optional& bounds_any,
         const Optional& slopes_any, double scale, bool causal, int64_t window)
      : q(q_any), k(k_any), v(v_any), bounds(bounds_any), slopes(slopes_any) {
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && is_like(k, v) && q.scalar_type() == k.scalar_type() &&
                        q.size(0) == k.size(0) && q.size(3) == k.size(3) && q.size(3) > 0 && k.size(2) > 0 &&
                        q.size(2) % k.size(2) == 0,
                    "attention takes q[B, Sq, H, D] and k, v[B, Sk, Hk, D] of one dtype, H a multiple of Hk");
    STD_TORCH_CHECK(scale > 0 && std::isfinite(scale) && window >= 0 && (window == 0 || causal),
                    "attention takes a positive scale, and a window >= 0 that is causal");
    q = readable(q), k = readable(k), v = readable(v);
    problem = {ml::format_of(q), q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3),
               static_cast<float>(scale), causal, window, nullptr, nullptr, view_of(q), view_of(k), view_of(v)};
    if (bounds.has_value()) {
      STD_TORCH_CHECK(bounds->scalar_type() == ScalarType::Int && bounds->dim() == 3 && bounds->size(0) == q.size(0) &&
                          bounds->size(1) == q.size(1) && bounds->size(2) == 2,
                      "attention takes bounds int32[B, Sq, 2]");
      bounds = torch::stable::contiguous(*bounds);
      problem.bounds = static_cast<const int32_t*>(bounds->const_data_ptr());
    }
    if (slopes.has_value()) {
      STD_TORCH_CHECK(slopes->scalar_type() == ScalarType::Float && slopes->dim() == 1 && slopes->size(0) == q.size(2),
                      "attention takes slopes fp32[H]");
      slopes = torch::stable::contiguous(*slopes);
      problem.slopes = static_cast<const float*>(slopes->const_data_ptr());
    }
  }
};

// Runs function(scratch, begin, end) over items in parallel, each thread with `floats` of memory of its own.
template <class Function>
void in_parallel(int64_t items, int64_t numbers_per_item, int64_t floats, const Function& function) {
  if (items == 0) return;
  std::atomic<bool> is_short{false};  // an exception in a thread of the pool would end the process
  torch::stable::parallel_for(0, items, ml::grain(numbers_per_item), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> memory(new (std::nothrow) float[floats + 16]);
    if (memory == nullptr) {
      is_short = true;
      return;
    }
    const auto address = reinterpret_cast<uintptr_t>(memory.get());
    function(memory.get() + (64 - address % 64) % 64 / sizeof(float), begin, end);
  });
  STD_TORCH_CHECK(!is_short, "attention: no memory for ", floats * sizeof(float),
                  " bytes of scratch space in a thread");
}

Tensor floats_like(const Tensor& t, std::vector<int64_t> shape) {
  return torch::stable::new_empty(t, shape, ScalarType::Float);
}

float* data_of(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

std::tuple<Tensor, Tensor, Tensor> attention_cpu(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any,
                                                 const Optional& bounds, const Optional& slopes, double scale,
                                                 bool causal, int64_t window, int64_t isa) {
  const Inputs inputs(q_any, k_any, v_any, bounds, slopes, scale, causal, window);
  const ml::AttentionProblem& p = inputs.problem;
  const ml::AttentionCpu& kernels = kernels_for(p.format, isa);
  Tensor out = torch::stable::new_empty(inputs.q, {p.batch, p.num_queries, p.heads, p.dim});
  Tensor lse = floats_like(out, {p.batch, p.heads, p.num_queries});
  Tensor stats = floats_like(out, {p.batch, p.heads, p.num_queries, 2});
  Tensor packed = floats_like(out, {kernels.packed_floats(p)});
  float *lse_data = data_of(lse), *stats_data = data_of(stats), *packed_data = data_of(packed);
  void* out_data = out.mutable_data_ptr();
  in_parallel(p.batch * p.kv_heads, p.num_keys * p.dim, kernels.pack_scratch(p),
              [&](float* scratch, int64_t begin, int64_t end) { kernels.pack(p, packed_data, scratch, begin, end); });
  const int64_t blocks = kernels.num_query_blocks(p);
  in_parallel(p.batch * p.heads * blocks, p.num_queries * p.num_keys / std::max<int64_t>(1, blocks),
              kernels.forward_scratch(p), [&](float* scratch, int64_t begin, int64_t end) {
                kernels.forward(p, packed_data, out_data, lse_data, stats_data, scratch, begin, end);
              });
  return {out, lse, stats};
}

// Below so many key heads, the query heads of a group are items of their own, so that more threads have work.
constexpr int64_t kEnoughItems = 8;

std::tuple<Tensor, Tensor, Tensor> attention_backward_cpu(const Tensor& d_out_any, const Tensor& q_any,
                                                          const Tensor& k_any, const Tensor& v_any, const Tensor& out,
                                                          const Tensor& stats_any, const Optional& d_lse_any,
                                                          const Optional& bounds, const Optional& slopes, double scale,
                                                          bool causal, int64_t window, int64_t isa) {
  const Inputs inputs(q_any, k_any, v_any, bounds, slopes, scale, causal, window);
  const ml::AttentionProblem& p = inputs.problem;
  STD_TORCH_CHECK(is_like(d_out_any, inputs.q) && is_like(out, inputs.q),
                  "attention_backward takes d_out and out like q");
  const auto is_numbers = [&](const Tensor& t, int64_t count) {
    return t.scalar_type() == ScalarType::Float && t.numel() == p.batch * p.heads * p.num_queries * count;
  };
  STD_TORCH_CHECK(is_numbers(stats_any, 2) && (!d_lse_any.has_value() || is_numbers(*d_lse_any, 1)),
                  "attention_backward takes stats fp32[B, H, Sq, 2] and d_lse fp32[B, H, Sq]");
  const ml::AttentionCpu& kernels = kernels_for(p.format, isa);
  const Tensor d_out = readable(d_out_any), out_read = readable(out), stats = torch::stable::contiguous(stats_any);
  const Optional d_lse = d_lse_any.has_value() ? Optional(torch::stable::contiguous(*d_lse_any)) : Optional();
  Tensor dq = torch::stable::new_empty(inputs.q, {p.batch, p.num_queries, p.heads, p.dim});
  Tensor dk = torch::stable::new_empty(inputs.q, {p.batch, p.num_keys, p.kv_heads, p.dim});
  Tensor dv = torch::stable::new_empty(inputs.q, {p.batch, p.num_keys, p.kv_heads, p.dim});
  const int64_t group = p.heads / p.kv_heads, key_items = p.batch * p.kv_heads;
  const int64_t heads_per_part = key_items >= kEnoughItems ? std::max<int64_t>(1, group) : 1;
  const int64_t items = group == 0 ? 0 : key_items * (group / heads_per_part);
  const bool in_parts = items > key_items;
  Tensor parts = floats_like(dq, {in_parts ? items * kernels.part_floats(p) : 0});
  const ml::AttentionGradients g = {view_of(d_out), view_of(out_read),
                                    d_lse.has_value() ? static_cast<const float*>(d_lse->const_data_ptr()) : nullptr,
                                    static_cast<const float*>(stats.const_data_ptr()), dq.mutable_data_ptr(),
                                    dk.mutable_data_ptr(), dv.mutable_data_ptr(), heads_per_part, data_of(parts)};
  if (items == 0) return {dq, torch::stable::zero_(dk), torch::stable::zero_(dv)};  // no query heads
  in_parallel(items, p.num_queries * p.num_keys, kernels.backward_scratch(p),
              [&](float* scratch, int64_t begin, int64_t end) { kernels.backward(p, g, scratch, begin, end); });
  if (in_parts)
    in_parallel(key_items, group * p.num_keys * p.dim, 0,
                [&](float*, int64_t begin, int64_t end) { kernels.sum_parts(p, g, begin, end); });
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_lite_cpu, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? bounds, Tensor? slopes, float scale, bool causal, int window, "
      "int isa=-1) -> (Tensor out, Tensor lse, Tensor stats)");
  m.def(
      "attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor stats, Tensor? d_lse, "
      "Tensor? bounds, Tensor? slopes, float scale, bool causal, int window, int isa=-1) "
      "-> (Tensor dq, Tensor dk, Tensor dv)");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_lite_cpu, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention_cpu));
  m.impl("attention_backward", TORCH_BOX(&attention_backward_cpu));
}
