"""Grouped-query attention with documents, a sliding window, ALiBi and cached keys (arXiv:1706.03762, equation 1).

Grouped heads: arXiv:2305.13245. Sliding window: arXiv:2004.05150, section 3.1, and arXiv:2310.06825, section 2. ALiBi:
arXiv:2108.12409, section 3. The kernels are flash attention (arXiv:2205.14135, arXiv:2307.08691): memory grows with S,
not with its square; attention_kernels.py has their equations.

The queries are the last Sq of Sk positions: all of them in training, the new tokens where the keys before them come
from a cache. The kernels know what a query sees as a range of keys, so documents and lengths make no mask.
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from megatron_lite.ops import attention_kernels, checks, dispatch, native
from megatron_lite.ops.attention_sdpa import attention_sdpa, visible
from megatron_lite.ops.precision import wide_dtype


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    lengths: Tensor | None = None,
    slopes: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    deterministic: bool = True,
    backend: str = "auto",
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    lengths: Tensor | None = None,
    slopes: Tensor | None = None,
    scale: float | None = None,
    *,
    return_lse: Literal[True],
    deterministic: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    lengths: Tensor | None = None,
    slopes: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v for q[B, Sq, H, D] and k, v[B, Sk, Hk, D]; returns [B, Sq, H, D] in q's dtype.

    fp32, bf16, fp16 and fp64, any strides; scores, softmax and sums are fp32 (fp64 for fp64). H is a multiple of Hk:
    query head h reads key head h // (H / Hk). Query i stands at position p = Sk - Sq + i. What it sees: with `causal`
    no key after itself; with `window` (causal only) only the last `window` keys, itself included; with `documents`
    int[B, Sk] (Sq <= Sk), the document of each position, only keys of its own; `document_bounds` makes boundaries
    int32[B, Sk, 2] of them, first and last + 1 of the positions of each position's document, which are taken too and
    save each call the search for them. `lengths` int[B] are the keys of each row where rows have fewer than Sk: query i
    of row b then stands at position lengths[b] - Sq + i, and what lies behind is not looked at (causal only, from Sq to
    Sk, without documents; on a GPU, which is not waited for, and under torch.compile larger ones count as Sk). A query
    that sees nothing gets zeros.

    `scale` is 1 / sqrt(D) when None. `slopes` fp32[H] (ALiBi) takes slope_h |p - j| from the score of key j; they get
    no gradient. With `return_lse` the result is (out, lse): lse fp32[B, H, Sq] (fp64 for fp64), the natural logarithm
    of the sum of the exponentials of a query's scores, -inf where it sees nothing; gradients flow through both (without
    `lengths`). `deterministic` is about the backward on CUDA, which may add in any order without it. `backend` is one
    of auto, reference, cpu, triton, cuda, sdpa; sdpa has neither slopes nor lse.

    Raises ValueError for arguments of other dtypes, shapes or devices, and for a backend that cannot run.
    """
    _check(q, k, v, documents, causal, window, lengths, slopes, scale, return_lse)
    if lengths is not None:
        lengths = lengths.long().clamp(max=k.shape[1])  # in 64 bits: Sk may be more than lengths' own type holds
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = _choose(q, k, backend, has_extras=slopes is not None or return_lse)
    if chosen == "sdpa":
        return attention_sdpa(q, k, v, documents, causal, window, lengths, scale)
    bounds = None
    if chosen != "reference" and documents is not None:
        bounds = documents if documents.dim() == 3 else attention_kernels.document_bounds(documents)
        if bounds is None:  # no range describes what a query sees
            return _in_pieces(q, k, v, documents, causal, window, slopes, scale, return_lse, backend)
        bounds = bounds[:, k.shape[1] - q.shape[1] :]
    if chosen == "reference":
        out, lse = attention_lse_reference(q, k, v, documents, causal, window, lengths, slopes, scale)
    elif lengths is not None:
        bounds = _bounds_of_lengths(lengths, q.shape[1], window)
        out, lse = attention_kernels.forward(chosen, q, k, v, bounds, slopes, scale, False, 0, deterministic)
    else:
        mask = (bounds, slopes, scale, causal, window or 0)
        out, lse = attention_kernels.forward(chosen, q, k, v, *mask, deterministic)
    return (out, lse) if return_lse else out


def document_bounds(documents: Tensor, dtype: torch.dtype, backend: str = "auto") -> Tensor:
    """`documents` int[B, S] as several calls of `attention` on all S positions take them best, in `dtype` by `backend`.

    Boundaries int32[B, S, 2] where a kernel of ours runs, made once for all these calls. The very documents where
    torch's kernel (what auto is on a GPU) or the reference runs, which make a mask in each call, and where a document
    comes in several pieces, which no range describes. Looks at the values, if a kernel runs, so a GPU is waited for.

    Raises ValueError for documents of another dtype or shape, boundaries too, and for a backend that cannot run.
    """
    checks.require_dense("document_bounds", "documents", documents)
    is_right = documents.dim() == 2 and _holds_integers(documents)
    checks.require(is_right, "document_bounds", "documents", documents, "int [B, S]")
    if dispatch.select("attention", backend, dtype, documents.device.type).backend in ("sdpa", "reference"):
        return documents
    bounds = attention_kernels.document_bounds(documents)
    return documents if bounds is None else bounds


def _choose(q: Tensor, k: Tensor, backend: str, *, has_extras: bool) -> str:
    """The backend that runs. `has_extras`: slopes or the log-sum-exp, which torch's kernels do not have."""
    if has_extras and backend == "sdpa":
        raise ValueError("attention: backend is sdpa; slopes and return_lse take auto, cpu, triton, cuda or reference")
    chosen = dispatch.select("attention", backend, q.dtype, q.device.type).backend
    if min(q.numel(), k.numel()) == 0:
        return "reference"
    if has_extras:
        chosen = dispatch.select("attention_lse", backend, q.dtype, q.device.type).backend
    is_short = backend == "auto" and chosen == "cpu" and q.shape[1] < dispatch.FEW_QUERIES
    return "sdpa" if is_short and not has_extras else chosen


def _in_pieces(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor,
    causal: bool,
    window: int | None,
    slopes: Tensor | None,
    scale: float,
    return_lse: bool,
    backend: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` where a document comes in several pieces: by a mask."""
    if backend != "auto":
        takes = "documents that are one run each; backend auto, sdpa or reference takes any"
        raise ValueError(f"attention: documents has a document in several pieces; backend {backend} takes {takes}")
    if slopes is None and not return_lse:
        return attention_sdpa(q, k, v, documents, causal, window, None, scale)
    out, lse = attention_lse_reference(q, k, v, documents, causal, window, None, slopes, scale)
    return (out, lse) if return_lse else out


def _bounds_of_lengths(lengths: Tensor, num_queries: int, window: int | None) -> Tensor:
    """int32 [B, Sq, 2]: the keys that each of the last queries of rows of these lengths sees."""
    last = (lengths - num_queries)[:, None] + torch.arange(1, num_queries + 1, device=lengths.device)
    first = torch.zeros_like(last) if window is None else (last - window).clamp(min=0)
    return torch.stack((first, last), dim=-1).to(torch.int32)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    lengths: Tensor | None = None,
    slopes: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The specification of `attention`, in plain torch; scores and softmax in fp32 (fp64 for fp64)."""
    return attention_lse_reference(q, k, v, documents, causal, window, lengths, slopes, scale)[0]


def attention_lse_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    lengths: Tensor | None = None,
    slopes: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification of `attention` with `return_lse`, in plain torch."""
    wide = wide_dtype(q.dtype)
    num_queries, num_keys, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    q_BHSD = q.to(wide).transpose(1, 2)
    k_BHSD = k.to(wide).transpose(1, 2).repeat_interleave(group, dim=1)
    v_BHSD = v.to(wide).transpose(1, 2).repeat_interleave(group, dim=1)
    scores = q_BHSD @ k_BHSD.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if slopes is not None:
        queries = torch.arange(num_keys - num_queries, num_keys, device=q.device)[:, None]
        if lengths is not None:
            queries = queries + (lengths - num_keys)[:, None, None, None]
        distance = (queries - torch.arange(num_keys, device=q.device)).abs()
        scores = scores - slopes.to(wide)[:, None, None] * distance
    mask = visible(documents, causal, num_queries, num_keys, q.device, window, lengths)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    lse = scores.logsumexp(dim=-1)
    # A query that sees nothing has weights e^(-inf - 0) = 0; its true -inf would make them NaN.
    weights = (scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()
    return (weights @ v_BHSD).transpose(1, 2).to(q.dtype), lse


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None,
    causal: bool,
    window: int | None,
    lengths: Tensor | None,
    slopes: Tensor | None,
    scale: float | None,
    return_lse: bool,
) -> None:
    op = "attention"
    checks.require_float(op, "q", q)
    checks.require(q.dim() == 4 and q.shape[3] > 0, op, "q", q, "[B, Sq, H, D]")
    batch, num_queries, heads, dim = q.shape
    takes = f"[B, Sk, Hk, D] = [{batch}, Sk, Hk, {dim}], as q has it"
    checks.require(k.dim() == 4 and (k.shape[0], k.shape[3]) == (batch, dim), op, "k", k, takes)
    num_keys, kv_heads = k.shape[1], k.shape[2]
    checks.require(kv_heads > 0 and heads % kv_heads == 0, op, "k", k, f"heads that divide q's {heads}")
    checks.require_shape(op, "v", v, tuple(k.shape), "k's shape")
    checks.require_alike(op, "q", q, k=k, v=v)
    checks.require_device(op, "q", q, documents=documents, lengths=lengths, slopes=slopes)
    is_count = window is None or (isinstance(window, int) and not isinstance(window, bool) and causal and window > 0)
    checks.require(is_count, op, "window", window, "a number of keys up to the query: positive, and causal")
    checks.require(scale is None or (checks.is_number(scale) and scale > 0), op, "scale", scale, "a positive number")
    if documents is not None:
        shape = (batch, num_keys)
        takes = f"int [B, Sk] = {list(shape)}, or boundaries int32 [B, Sk, 2]"
        is_right = documents.shape == shape and _holds_integers(documents)
        is_bounds = documents.shape == (*shape, 2) and documents.dtype == torch.int32
        checks.require(is_right or is_bounds, op, "documents", documents, takes)
        checks.require(num_queries <= num_keys, op, "q", q, f"at most {num_keys} queries, the last ones of documents")
    if lengths is not None:
        is_right = lengths.shape == (batch,) and _holds_integers(lengths)
        checks.require(is_right, op, "lengths", lengths, f"int [B] = [{batch}]")
        alone = causal and documents is None and not return_lse
        checks.require(alone, op, "lengths", lengths, "causal attention without documents and return_lse")
        if lengths.device.type == "cpu" and not native.is_traced():  # a GPU would be waited for
            values = lengths.tolist()
            takes = f"numbers of keys from {num_queries}, as q has queries, to {num_keys}"
            checks.require(all(num_queries <= n <= num_keys for n in values), op, "lengths", values, takes)
    if slopes is not None:
        is_right = slopes.shape == (heads,) and slopes.dtype == torch.float32
        checks.require(is_right, op, "slopes", slopes, f"fp32 [H] = [{heads}]")
        checks.require(not slopes.requires_grad, op, "slopes", "one that asks for a gradient", "none: detach it")


def _holds_integers(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
