"""Sums of floating-point numbers without rounding, so that the order of the additions cannot matter.

A float64 is an integer times a power of two. The numbers are added as integers, in a row of 32-bit limbs held in
int64 (a Kulisch accumulator): any number of ranks may add their rows, in any order, and the result has the same bits.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

_LIMB_BITS = 32
_LOWEST_BIT = 1126  # 2^-1126 is the weight of bit 0: the least that frexp's exponent minus 53 mantissa bits can be
_NUM_LIMBS = (1024 + _LOWEST_BIT) // _LIMB_BITS + 3
_NON_FINITE = _NUM_LIMBS  # one more entry counts infinities and NaNs

LENGTH = _NUM_LIMBS + 1


def to_limbs(values: Tensor) -> Tensor:
    """The exact sum of ``values`` (float64, any shape) as int64 ``[LENGTH]``.

    Rows may be added with ``+`` or an integer all-reduce. Up to 2^29 numbers may enter a sum.
    """
    assert values.dtype == torch.float64
    values = values.flatten()
    finite = torch.isfinite(values)
    mantissa, exponent = torch.frexp(torch.where(finite, values, torch.zeros_like(values)))
    integer = (mantissa * 2.0**53).to(torch.int64)
    position = exponent.to(torch.int64) - 53 + _LOWEST_BIT
    limbs = torch.zeros(LENGTH, dtype=torch.int64, device=values.device)
    # Two halves of the mantissa: 27 bits shifted by up to 31 fit into an int64.
    low, high = integer & (2**27 - 1), integer >> 27
    for part, bit in ((low, position), (high, position + 27)):
        limb, shifted = bit // _LIMB_BITS, part << (bit % _LIMB_BITS)
        limbs.index_add_(0, limb, shifted & (2**_LIMB_BITS - 1))
        limbs.index_add_(0, limb + 1, shifted >> _LIMB_BITS)
    limbs[_NON_FINITE] = (~finite).sum()
    return limbs


def from_limbs(limbs: Tensor) -> float:
    """The float64 nearest to the exact sum (infinite beyond float64's range); NaN if an infinity or a NaN went in."""
    row = limbs.tolist()
    if row[_NON_FINITE]:
        return math.nan
    total = sum(limb << (_LIMB_BITS * i) for i, limb in enumerate(row[:_NUM_LIMBS]))
    try:
        return float(Fraction(total, 1 << _LOWEST_BIT))
    except OverflowError:
        return math.inf if total > 0 else -math.inf
