"""Sums of squares of a flat gradient, such that slicing it changes no bit."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_lite.utils.exact import to_limbs

BLOCK = 256  # divides every slice of a bucket
_CHUNK = 1 << 17  # elements worked on at once: a float64 copy of them stays in cache


def sum_of_squares(gradient: Tensor, uncounted: Iterable[tuple[int, int]]) -> Tensor:
    """Exact sum, as limbs (see ``utils/exact.py``), of float64 sums of squares over blocks of 256 elements.

    gradient: flat, any float dtype, a multiple of 256 elements long. uncounted: elements ``[start, stop)`` to leave
    out. A block's sum is a fixed tree of additions, so it does not depend on what surrounds the block.
    """
    assert gradient.numel() % BLOCK == 0
    skipped = list(uncounted)
    sums = []
    for first in range(0, gradient.numel(), _CHUNK):
        last = min(first + _CHUNK, gradient.numel())
        squares = gradient[first:last].to(torch.float64, copy=True)
        for start, stop in skipped:
            squares[max(start - first, 0) : max(stop - first, 0)] = 0
        squares = squares.square_().view(-1, BLOCK)
        while squares.shape[1] > 1:
            half = squares.shape[1] // 2
            squares = squares[:, :half] + squares[:, half:]
        sums.append(squares[:, 0])
    if not sums:
        return to_limbs(gradient.to(torch.float64))
    return to_limbs(torch.cat(sums))


def clip_factor(norm: float, max_norm: float) -> float:
    """What to multiply gradients by so that their norm is at most ``max_norm`` (0 turns clipping off).

    The 1e-6 in the denominator is ``torch.nn.utils.clip_grad_norm_``'s, so that both clip alike.
    """
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0
