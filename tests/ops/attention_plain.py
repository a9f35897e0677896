"""Attention as one would write it without a thought for precision: every intermediate in the dtype of the inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_lite.ops.attention_sdpa import visible


def plain_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    lengths: Tensor | None = None,
    slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse), lse in fp32 as the op returns it, or fp64."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    num_queries, num_keys = q.shape[2], k.shape[2]
    if slopes is not None:
        positions = torch.arange(num_keys - num_queries, num_keys)[:, None]
        distance = (positions - torch.arange(num_keys)).abs()
        scores = scores - (slopes[:, None, None] * distance).to(scores.dtype)
    mask = visible(documents, causal, num_queries, num_keys, q.device, window, lengths)
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(dim=-1)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2), lse if lse.dtype == torch.float64 else lse.float()


def plain(*arguments: Any, **options: Any) -> Tensor:
    """The first of what plain_lse returns."""
    return plain_lse(*arguments, **options)[0]


def qkv(
    batch: int, tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, keys: int = 0
) -> list[Tensor]:
    """Random q[batch, tokens, heads, dim] and k, v of `keys` positions, or as many as tokens, always the same."""
    torch.manual_seed(tokens * 1000 + heads * 10 + kv_heads)
    shapes = ((tokens, heads), (keys or tokens, kv_heads), (keys or tokens, kv_heads))
    return [torch.randn(batch, size, h, dim).to(dtype) for size, h in shapes]


def documents_of(lengths: list[int], batch: int) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(batch, -1)
