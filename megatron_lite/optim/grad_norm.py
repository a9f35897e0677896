"""Sums of squares of a flat gradient, such that slicing it changes no bit."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_lite.ops.block_squares import BLOCK, block_squares
from megatron_lite.ops.exact_sum import exact_sum


def sum_of_squares(gradient: Tensor, uncounted: Iterable[tuple[int, int]]) -> Tensor:
    """Exact sum, as limbs (see ``utils/exact.py``), of float64 sums of squares over blocks of 256 elements.

    gradient: flat, any float dtype, a multiple of 256 elements long, cut at multiples of 256 from whatever it is a
    slice of. uncounted: elements ``[start, stop)`` to leave out, but for what is no number among them: the sum of all
    ranks is to be NaN wherever there is one, also in a copy that another rank counts.
    """
    sums = block_squares(gradient)
    skipped = list(uncounted)
    for start, stop in skipped:
        first, last = start // BLOCK, -(-stop // BLOCK)
        counted = gradient[first * BLOCK : last * BLOCK].clone()
        for begin, end in skipped:
            counted[max(begin - first * BLOCK, 0) : max(end - first * BLOCK, 0)] = 0
        whole = sums[first:last]
        sums[first:last] = torch.where(whole.isfinite(), block_squares(counted), whole)
    return exact_sum(sums)


def clip_factor(norm: float, max_norm: float) -> float:
    """What to multiply gradients by so that their norm is at most ``max_norm`` (0 turns clipping off).

    A norm that is not a number gives a factor that is none either.

    The 1e-6 in the denominator is ``torch.nn.utils.clip_grad_norm_``'s, so that both clip alike.
    """
    if max_norm == 0 or norm + 1e-6 <= max_norm:
        return 1.0
    return max_norm / (norm + 1e-6)
