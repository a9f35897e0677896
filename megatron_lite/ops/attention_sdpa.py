"""Attention by torch's own fused kernels, and which query may see which key as a mask.

A mask is made only where a causal kernel does not suffice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Queries that share one mask where a window makes one necessary: a mask of all S x S positions grows with the square.
WINDOW_CHUNK = 1024


def visible(
    documents: Tensor | None,
    causal: bool,
    num_queries: int,
    num_keys: int,
    device: torch.device,
    window: int | None = None,
    lengths: Tensor | None = None,
) -> Tensor | None:
    """bool [B, 1, Sq, Sk] or [Sq, Sk]: may query i (third dimension) see key j (last)? None when all may see all.

    documents: int [B, Sk], or as boundaries [B, Sk, 2].
    """
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
        own = documents[:, None, num_keys - num_queries :]
        if documents.dim() == 3:
            keys = torch.arange(num_keys, device=device)
            same = (own[..., :1] <= keys) & (keys < own[..., 1:])
        else:
            same = own[..., None] == documents[:, None, None, :]
        mask = same if mask is None else same & mask
    return mask


def attention_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None,
    causal: bool,
    window: int | None,
    lengths: Tensor | None,
    scale: float,
) -> Tensor:
    """`attention` by F.scaled_dot_product_attention, with a mask only where its causal kernel does not suffice."""
    num_queries, num_keys = q.shape[1], k.shape[1]
    if causal and num_queries > num_keys:  # the first of them see nothing
        seeing = attention_sdpa(q[:, num_queries - num_keys :], k, v, documents, causal, window, lengths, scale)
        return F.pad(seeing, (0, 0, 0, 0, num_queries - num_keys, 0))
    if window is not None and window >= num_keys:
        window = None
    if num_queries == 1 and lengths is None and documents is None:
        if window is not None:
            k, v = k[:, -window:], v[:, -window:]
        return _sdpa(q, k, v, None, scale, is_causal=False)
    if window is not None and lengths is None and num_queries > 1:
        return _attention_in_chunks(q, k, v, documents, window, scale)
    if documents is None and lengths is None and (not causal or num_queries == num_keys):
        return _sdpa(q, k, v, None, scale, is_causal=causal)
    return _sdpa(
        q, k, v, visible(documents, causal, num_queries, num_keys, q.device, window, lengths), scale, is_causal=False
    )


def _attention_in_chunks(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, window: int, scale: float
) -> Tensor:
    """Causal attention with a window, chunk by chunk of queries, each with the keys that one of them sees."""
    past, outputs = k.shape[1] - q.shape[1], []
    for start in range(0, q.shape[1], WINDOW_CHUNK):
        stop = min(start + WINDOW_CHUNK, q.shape[1])
        keys = slice(max(0, past + start + 1 - window), past + stop)
        own = None if documents is None else documents[:, keys]
        if own is not None and own.dim() == 3:  # boundaries, counted from the first of these keys
            own = own - keys.start
        mask = visible(own, True, stop - start, keys.stop - keys.start, q.device, window)
        outputs.append(_sdpa(q[:, start:stop], k[:, keys], v[:, keys], mask, scale, is_causal=False))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, *, is_causal: bool) -> Tensor:
    """torch's fused attention of q[B, Sq, H, D] over k, v[B, Sk, Hk, D], by its own choice of kernel."""
    batch, num_queries, heads, dim = q.shape
    if num_queries == 1:  # the query heads of a group are as many queries of one head, and no key is repeated for them
        grouped = q.reshape(batch, k.shape[2], heads // k.shape[2], dim)
        out = F.scaled_dot_product_attention(grouped, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale)
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
        scale=scale,
        enable_gqa=heads != k.shape[2],
    )
    return out.transpose(1, 2)
