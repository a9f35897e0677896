"""Rounds fp32 to bf16 at random, such that the mean is right (Gupta et al. 2015; arXiv:2010.06192 for bf16 weights).

An update that is smaller than half of the distance between two bfloat16 is lost by rounding to the nearest. Here a
number goes to one of the two bfloat16 next to it, to each with the probability that makes the mean the number itself,
so that many small updates add up to what they are together.

The random numbers have an identity: they depend on a key and on the element's place in the global tensor, never on
which rank holds it. They are SplitMix64's (Steele et al. 2014): a mix of the key and the place, in integers, so that
every device computes the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_BLOCK = 1 << 15  # elements at a time: the integers that a block needs stay in a CPU's cache
_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def rounding_key(seed: int, name: str, update: int) -> int:
    """What distinguishes the random numbers of one parameter in one update, counted from 1: 64 bits."""
    digest = hashlib.sha256(f"{seed}/{name}/rounding/{update}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def round_stochastically(
    values: Tensor, out: Tensor, *, key: int, offsets: Sequence[int], shape: Sequence[int]
) -> None:
    """Fills ``out`` (bf16) with ``values`` (fp32, of the same shape), rounded; what is no number stays what it is.

    Both are a box of a global tensor of ``shape``, which begins there at ``offsets``. key: of `rounding_key`.
    """
    assert values.dtype == torch.float32 and out.dtype == torch.bfloat16 and values.shape == out.shape
    rows = max(1, _BLOCK // max(1, math.prod(values.shape[1:])))
    for start in range(0, values.shape[0], rows):
        part, (first, *rest) = values[start : start + rows], offsets
        noise = random_bits(key, _places(part.shape, (first + start, *rest), shape, values.device))
        # The 16 bits that bf16 drops, plus as many at random: a carry is the step to the farther of the two.
        rounded = (part.contiguous().view(torch.int32) + noise).bitwise_and_(-(1 << 16)).view(torch.float32)
        out[start : start + rows] = torch.where(part.isfinite(), rounded, part)


def random_bits(key: int, places: Tensor) -> Tensor:
    """16 random bits for each place (int64, any shape), as int32."""
    bits = places * _signed(_GAMMA)
    bits += _signed(key)
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        bits ^= (bits >> shift).bitwise_and_((1 << (64 - shift)) - 1)
        bits *= _signed(factor)
    # The last step of SplitMix64 leaves the upper half as it is, of which these are the upper bits.
    return (bits >> 48).bitwise_and_(0xFFFF).to(torch.int32)


def _places(box: Sequence[int], offsets: Sequence[int], shape: Sequence[int], device: torch.device) -> Tensor:
    """The index of each element of a box in the flattened global tensor."""
    places = torch.zeros((), dtype=torch.int64, device=device)
    for size, offset, whole in zip(box, offsets, shape, strict=True):
        places = places[..., None] * whole + torch.arange(offset, offset + size, device=device)
    return places


def _signed(number: int) -> int:
    """The int64 of the same 64 bits."""
    return (number & (1 << 64) - 1) - (1 << 64 if number >> 63 & 1 else 0)
