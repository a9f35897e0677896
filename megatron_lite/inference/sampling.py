"""From logits to the next token: pure functions, the same on every rank and in every layout.

Where the meaning of a setting has a choice it is that of transformers: the penalty comes first, then the temperature,
then top-k, then top-p on what is left. Random numbers belong to (seed, number of the prompt, number of the token).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lite.utils.random import generator


def penalise_repetition(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Scores ``[B, V]`` in which tokens with ``seen`` (bool ``[B, V]``) are less likely for a penalty above 1.

    A positive score is divided by the penalty and a negative one multiplied (CTRL, arXiv:1909.05858, section 4.1, for
    logits of either sign).
    """
    return torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits ``[B, V]`` with -infinity for all but the k highest of a row; what equals the k-th stays."""
    lowest = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < lowest, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Logits ``[B, V]`` with -infinity outside of the smallest set of likeliest tokens of mass at least p.

    Nucleus sampling (arXiv:1904.09751, section 3.1); the likeliest token always stays.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    mass = ordered.softmax(dim=-1)
    is_out = mass.cumsum(dim=-1) - mass >= p
    is_out[:, 0] = False
    return logits.masked_fill(torch.zeros_like(is_out).scatter(-1, order, is_out), -torch.inf)


def probabilities(logits: Tensor, temperature: float, top_k: int | None = None, top_p: float = 1.0) -> Tensor:
    """The distribution of the next token, float64 ``[B, V]``, of logits ``[B, V]`` in any float dtype."""
    logits = logits.to(torch.float64) / temperature
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p < 1:
        logits = keep_top_p(logits, top_p)
    return logits.softmax(dim=-1)


def draw(distribution: Tensor, uniforms: Tensor) -> Tensor:
    """One token ``[B]`` from each row of ``distribution [B, V]``, by inversion of its cumulative sum.

    uniforms: ``[B]`` in [0, 1). Logits that differ in their last bits, as layouts' do, give the same token unless the
    number falls between the two sums.
    """
    cumulative = distribution.cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Rounding must not carry the target to the total: no token lies behind it.
    target = torch.minimum(uniforms.to(total)[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def uniforms(seed: int, prompt: int, count: int) -> Tensor:
    """The first ``count`` random numbers of a prompt, float64 in [0, 1): one for each token that may be drawn."""
    return torch.from_numpy(generator(seed, f"generate/{prompt}").random(count))
