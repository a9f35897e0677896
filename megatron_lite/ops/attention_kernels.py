"""Attention as operators: what the C++, Triton and CUDA kernels compute, with fake and autograd registrations.

Every backend has the same two functions. Arithmetic and sums are fp32, storage is fp32, bf16 or fp16.

    forward(q[B, Sq, H, D], k[B, Sk, Hk, D], v[B, Sk, Hk, D], bounds int32[B, Sq, 2] or None, slopes fp32[H] or None,
            scale float, causal bool, window int (0 = none))
        -> (out[B, Sq, H, D] in q's dtype, lse fp32[B, H, Sq] natural log)
    backward(d_out, q, k, v, out, lse, d_lse or None, bounds, slopes, scale, causal, window, deterministic)
        -> (dq, dk, dv)

Query i stands at position p = Sk - Sq + i, and query head h reads key head h // (H / Hk). Its score of key j is

    scale q.k - slope_h |p - j|           (ALiBi, arXiv:2108.12409, section 3; without slopes the first term alone)

for the keys that it sees, and lse is the logarithm of the sum of the exponentials of its scores. It sees the keys of
the half-open range [first, last) in `bounds`, cut to j <= p with `causal` and to j > p - window with `window` (causal
only). The range is monotone in i where it stands for packed documents, so that kernels can skip blocks; it may be
empty. A query that sees no key gets zeros and lse = -inf, and gives no gradient.

    delta_i = d_out_i . out_i - d_lse_i       P_ij = e^(score_ij - lse_i)
    dS_ij = P_ij (d_out_i . v_j - delta_i)    dq_i = scale sum_j dS_ij k_j
    dv_j = sum_i P_ij d_out_i                 dk_j = scale sum_i dS_ij q_i

The sums over i of a key head go over all query heads of its group. No gradient for slopes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_lite.ops import native

_Tensors = tuple[Tensor, ...]
_MASK = "Tensor? bounds, Tensor? slopes, float scale, bool causal, int window"


def forward(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """(out, lse) by `backend`: cpu, triton or cuda. Differentiable in q, k and v, through both."""
    arguments = (q, k, v, bounds, slopes, scale, causal, window, deterministic)
    if backend == "cpu" and native.runs_bare():
        out, lse, _ = _forward_cpu(*arguments)
    else:
        out, lse, *_ = getattr(torch.ops.megatron_lite, f"attention_{backend}")(*arguments)
    return out, lse


def document_bounds(documents: Tensor) -> Tensor | None:
    """int32 [B, S, 2]: first and last + 1 of the positions of each position's document; documents is int [B, S].

    None where a document comes in several pieces, which no range describes; under torch.compile ValueError then. Looks
    at the values, so a GPU is waited for.
    """
    if native.is_traced():
        return torch.ops.megatron_lite.document_bounds(documents)
    return _runs(documents) if _is_contiguous(documents) else None


def _is_contiguous(documents: Tensor) -> bool:
    """Whether each document of a row is one run. A row has as many runs as documents, then."""
    if not bool((documents[:, 1:] < documents[:, :-1]).any()):
        return True
    ordered = documents.sort(dim=1).values
    changes = [(rows[:, 1:] != rows[:, :-1]).sum(dim=1) for rows in (documents, ordered)]
    return bool((changes[0] == changes[1]).all())


def _runs(documents: Tensor) -> Tensor:
    size = documents.shape[1]
    places = torch.arange(size, dtype=torch.int32, device=documents.device).expand(documents.shape)
    changes = documents[:, 1:] != documents[:, :-1]
    edge = changes.new_ones(documents.shape[0], min(size, 1))
    begins, ends = torch.cat((edge, changes), dim=1), torch.cat((changes, edge), dim=1)
    first = torch.where(begins, places, 0).cummax(dim=1).values
    last = torch.where(ends, places + 1, size).flip(1).cummin(dim=1).values.flip(1)
    return torch.stack((first, last), dim=-1)


def _checked_runs(documents: Tensor) -> Tensor:
    if not _is_contiguous(documents):
        raise ValueError(
            "attention: documents has a document in several pieces; compiled, it takes documents that are one run each"
        )
    return _runs(documents)


def _fake_runs(documents: Tensor) -> Tensor:
    return documents.new_empty((*documents.shape, 2), dtype=torch.int32)


# The kernels of each backend, as operators on tensors. `saved` is what the backward needs beside the inputs and out:
# the log-sum-exp, or on the CPU the statistics that the forward returns for it.


def _forward_cpu(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, slopes: Tensor | None,
    scale: float, causal: bool, window: int, deterministic: bool,
) -> _Tensors:  # fmt: skip
    return torch.ops.megatron_lite_cpu.attention(q, k, v, bounds, slopes, scale, causal, window)


def _backward_cpu(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Tensor, d_lse: Tensor | None,
    bounds: Tensor | None, slopes: Tensor | None, scale: float, causal: bool, window: int, deterministic: bool,
) -> _Tensors:  # fmt: skip
    mask = (bounds, slopes, scale, causal, window)
    return torch.ops.megatron_lite_cpu.attention_backward(d_out, q, k, v, out, saved, d_lse, *mask)


def _forward_triton(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, slopes: Tensor | None,
    scale: float, causal: bool, window: int, deterministic: bool,
) -> _Tensors:  # fmt: skip
    return native.run_triton("attention", "forward", q, k, v, bounds, slopes, scale, causal, window)


def _backward_triton(d_out: Tensor, *others: Any) -> _Tensors:
    return native.run_triton("attention", "backward", d_out, *others)


def _forward_cuda(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, slopes: Tensor | None,
    scale: float, causal: bool, window: int, deterministic: bool,
) -> _Tensors:  # fmt: skip
    return native.run_cuda("attention", q, k, v, bounds, slopes, scale, causal, window, _shared_bytes(q))


def _backward_cuda(d_out: Tensor, *others: Any) -> _Tensors:
    return native.run_cuda("attention_backward", d_out, *others, _shared_bytes(d_out))


def _shared_bytes(tensor: Tensor) -> int:
    """Of shared memory, what a block can have on the tensor's device: the kernels choose their tiles by it."""
    properties = torch.cuda.get_device_properties(tensor.device)
    return properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # which torch's stub lacks


def _fake_backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> _Tensors:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _register(backend: str, key: str, forward: Callable[..., _Tensors], backward: Callable[..., _Tensors]) -> None:
    """Defines the operators attention_<backend> and attention_<backend>_backward."""
    name, has_stats = f"attention_{backend}", backend == "cpu"

    def fake(q: Tensor, *others: Any) -> _Tensors:
        per_query = (q.shape[0], q.shape[2], q.shape[1])
        lse = q.new_empty(per_query, dtype=torch.float32)
        stats = (q.new_empty((*per_query, 2), dtype=torch.float32),) if has_stats else ()
        return (q.new_empty(q.shape), lse, *stats)

    def setup_context(ctx: Any, inputs: tuple, output: _Tensors) -> None:
        q, k, v, bounds, slopes, *ctx.options = inputs
        ctx.save_for_backward(q, k, v, output[0], output[-1], bounds, slopes)
        ctx.set_materialize_grads(False)
        if has_stats:
            ctx.mark_non_differentiable(output[2])

    def gradient(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, saved, bounds, slopes = ctx.saved_tensors
        if d_out is None:
            d_out = torch.zeros_like(out)
        operator = getattr(torch.ops.megatron_lite, f"{name}_backward")
        grads = operator(d_out, q, k, v, out, saved, d_lse, bounds, slopes, *ctx.options)
        return (*grads, None, None, None, None, None, None)

    stats = ", Tensor stats" if has_stats else ""
    schema = f"{name}(Tensor q, Tensor k, Tensor v, {_MASK}, bool deterministic) -> (Tensor out, Tensor lse{stats})"
    native.define_operator(schema, key, forward, fake, gradient, setup_context)
    schema = (
        f"{name}_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor saved, Tensor? d_lse, "
        f"{_MASK}, bool deterministic) -> (Tensor dq, Tensor dk, Tensor dv)"
    )
    native.define_operator(schema, key, backward, _fake_backward)


_register("cpu", "CPU", _forward_cpu, _backward_cpu)
_register("triton", "CUDA", _forward_triton, _backward_triton)
_register("cuda", "CUDA", _forward_cuda, _backward_cuda)
native.define_operator(
    "document_bounds(Tensor documents) -> Tensor", "CompositeExplicitAutograd", _checked_runs, _fake_runs
)
