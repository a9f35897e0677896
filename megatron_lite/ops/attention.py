"""Causal grouped-query attention with document boundaries (arXiv:1706.03762, equation 1; GQA: arXiv:2305.13245)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.ops import dispatch


def attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None, causal: bool = True, backend: str = "auto"
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for q[B, S, H, D] and k, v[B, S, Hk, D]; returns [B, S, H, D] in q's dtype.

    H is a multiple of Hk: query head h reads key head h // (H / Hk). `documents` int[B, S] numbers the document of
    each token; a query then sees only keys of its own document. With `causal` it sees none after itself. `backend` is
    one of auto, reference, sdpa; one that cannot run raises ValueError.
    """
    assert q.dim() == k.dim() == 4 and k.shape == v.shape, f"{tuple(q.shape)} {tuple(k.shape)} {tuple(v.shape)}"
    assert q.shape[2] % k.shape[2] == 0, f"{q.shape[2]} query heads over {k.shape[2]} key heads"
    assert documents is None or documents.shape == q.shape[:2], "documents is [B, S]"
    choice = dispatch.select("attention", backend, q.dtype, q.device.type)
    if choice.backend == "reference":
        return attention_reference(q, k, v, documents, causal)
    return _attention_sdpa(q, k, v, documents, causal)


def visible(documents: Tensor | None, causal: bool, num_tokens: int, device: torch.device) -> Tensor | None:
    """bool [B, 1, S, S] or [S, S]: may query i (third dimension) see key j (last)? None when all may see all."""
    mask = None
    if causal:
        mask = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device).tril_()
    if documents is not None:
        same = documents[:, None, :, None] == documents[:, None, None, :]
        mask = same if mask is None else same & mask
    return mask


def _attention_sdpa(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, causal: bool) -> Tensor:
    mask = None if documents is None else visible(documents, causal, q.shape[1], q.device)
    if mask is not None and q.is_cuda and q.shape[2] != k.shape[2]:
        # With a mask and grouped heads CUDA has only a kernel that holds all S x S scores; repeated heads have another.
        k, v = (heads.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for heads in (k, v))
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal and mask is None,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None, causal: bool = True
) -> Tensor:
    """The specification of `attention`, in plain torch; scores and softmax in fp32 (fp64 for fp64)."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[2] // k.shape[2]
    q_BHSD = q.to(wide).transpose(1, 2)
    k_BHSD = k.to(wide).transpose(1, 2).repeat_interleave(group, dim=1)
    v_BHSD = v.to(wide).transpose(1, 2).repeat_interleave(group, dim=1)
    scores = q_BHSD @ k_BHSD.transpose(-1, -2) / math.sqrt(q.shape[-1])
    mask = visible(documents, causal, q.shape[1], q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return (scores.softmax(dim=-1) @ v_BHSD).transpose(1, 2).to(q.dtype)
