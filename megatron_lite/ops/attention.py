"""Causal grouped-query attention with documents, a sliding window and cached keys (arXiv:1706.03762, equation 1).

Grouped heads: arXiv:2305.13245. Sliding window: arXiv:2004.05150, section 3.1, and arXiv:2310.06825, section 2.

The queries are the last Sq of Sk positions: all of them in training, the new tokens where the keys before them come
from a cache. A mask is made only where a causal kernel does not suffice.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.ops import dispatch

# Queries that share one mask where a window makes one necessary: a mask of all S x S positions grows with the square.
WINDOW_CHUNK = 1024


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for q[B, Sq, H, D] and k, v[B, Sk, Hk, D]; returns [B, Sq, H, D] in q's dtype.

    H is a multiple of Hk: query head h reads key head h // (H / Hk). Query i stands at position Sk - Sq + i. What it
    sees: with `causal` no key after itself; with `window` (causal only) only the last `window` keys, itself included;
    with `documents` int[B, Sk], the document of each position, only keys of its own. `lengths` int[B] are the keys of
    each row where rows have fewer than Sk: query i of row b then stands at position lengths[b] - Sq + i, and what lies
    behind is not looked at (causal only, lengths >= Sq, without documents). `backend` is one of auto, reference, sdpa;
    one that cannot run raises ValueError.
    """
    assert q.dim() == k.dim() == 4 and k.shape == v.shape, f"{tuple(q.shape)} {tuple(k.shape)} {tuple(v.shape)}"
    assert q.shape[2] % k.shape[2] == 0, f"{q.shape[2]} query heads over {k.shape[2]} key heads"
    assert q.shape[1] <= k.shape[1], f"{q.shape[1]} queries are the last ones of {k.shape[1]} keys"
    assert documents is None or documents.shape == k.shape[:2], "documents is [B, Sk]"
    assert causal or (window is None and lengths is None), "a window and lengths count keys up to the query"
    assert lengths is None or documents is None, "rows of different lengths are one document each"
    choice = dispatch.select("attention", backend, q.dtype, q.device.type)
    if choice.backend == "reference":
        return attention_reference(q, k, v, documents, causal, window, lengths)
    return _attention_sdpa(q, k, v, documents, causal, window, lengths)


def visible(
    documents: Tensor | None,
    causal: bool,
    num_queries: int,
    num_keys: int,
    device: torch.device,
    window: int | None = None,
    lengths: Tensor | None = None,
) -> Tensor | None:
    """bool [B, 1, Sq, Sk] or [Sq, Sk]: may query i (third dimension) see key j (last)? None when all may see all."""
    mask = None
    if causal:
        keys = torch.arange(num_keys, device=device)
        queries = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
        if lengths is not None:
            queries = queries + (lengths - num_keys)[:, None, None, None]
        mask = keys <= queries
        if window is not None:
            mask &= keys > queries - window
    if documents is not None:
        same = documents[:, None, num_keys - num_queries :, None] == documents[:, None, None, :]
        mask = same if mask is None else same & mask
    return mask


def _attention_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None,
    causal: bool,
    window: int | None,
    lengths: Tensor | None,
) -> Tensor:
    num_queries, num_keys = q.shape[1], k.shape[1]
    if window is not None and window >= num_keys:
        window = None
    if num_queries == 1 and lengths is None and documents is None:
        if window is not None:
            k, v = k[:, -window:], v[:, -window:]
        return _sdpa(q, k, v, None, is_causal=False)
    if window is not None and lengths is None and num_queries > 1:
        return _attention_in_chunks(q, k, v, documents, window)
    if documents is None and lengths is None and (not causal or num_queries == num_keys):
        return _sdpa(q, k, v, None, is_causal=causal)
    return _sdpa(q, k, v, visible(documents, causal, num_queries, num_keys, q.device, window, lengths), is_causal=False)


def _attention_in_chunks(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, window: int) -> Tensor:
    """Causal attention with a window, chunk by chunk of queries, each with the keys that one of them sees."""
    past, outputs = k.shape[1] - q.shape[1], []
    for start in range(0, q.shape[1], WINDOW_CHUNK):
        stop = min(start + WINDOW_CHUNK, q.shape[1])
        keys = slice(max(0, past + start + 1 - window), past + stop)
        own = None if documents is None else documents[:, keys]
        mask = visible(own, True, stop - start, keys.stop - keys.start, q.device, window)
        outputs.append(_sdpa(q[:, start:stop], k[:, keys], v[:, keys], mask, is_causal=False))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, is_causal: bool) -> Tensor:
    """torch's fused attention of q[B, Sq, H, D] over k, v[B, Sk, Hk, D], by its own choice of kernel."""
    batch, num_queries, heads, dim = q.shape
    if num_queries == 1:  # the query heads of a group are as many queries of one head, and no key is repeated for them
        grouped = q.view(batch, k.shape[2], heads // k.shape[2], dim)
        out = F.scaled_dot_product_attention(grouped, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
        return out.reshape(batch, 1, heads, dim)
    if mask is not None and q.is_cuda and heads != k.shape[2]:
        # With a mask and grouped heads CUDA has only a kernel that holds all S x S scores; repeated heads have another.
        k, v = (t.repeat_interleave(heads // k.shape[2], dim=2) for t in (k, v))
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        enable_gqa=heads != k.shape[2],
    )
    return out.transpose(1, 2)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """The specification of `attention`, in plain torch; scores and softmax in fp32 (fp64 for fp64)."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[2] // k.shape[2]
    q_BHSD = q.to(wide).transpose(1, 2)
    k_BHSD = k.to(wide).transpose(1, 2).repeat_interleave(group, dim=1)
    v_BHSD = v.to(wide).transpose(1, 2).repeat_interleave(group, dim=1)
    scores = q_BHSD @ k_BHSD.transpose(-1, -2) / math.sqrt(q.shape[-1])
    mask = visible(documents, causal, q.shape[1], k.shape[1], q.device, window, lengths)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return (scores.softmax(dim=-1) @ v_BHSD).transpose(1, 2).to(q.dtype)
