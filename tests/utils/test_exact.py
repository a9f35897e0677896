"""Against ``math.fsum``, which rounds the exact sum once."""

from __future__ import annotations

import itertools
import math
import random
import struct
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from megatron_lite.utils.exact import LENGTH, from_limbs, to_limbs

TINY, SMALLEST_NORMAL, HUGE = 5e-324, 2.2250738585072014e-308, 1.7976931348623157e308
SUMS = {
    "nothing": [],
    "zero": [0.0, -0.0],
    "one": [1.0],
    "third": [1 / 3],
    "cancellation": [1e16, 1.0, -1e16],
    "what cancels is huge": [1e308, 1e-308, -1e308],
    "subnormals": [TINY, TINY, -3 * TINY, SMALLEST_NORMAL - TINY],
    "across the smallest normal": [SMALLEST_NORMAL, -TINY],
    "subnormal beside huge": [HUGE, TINY, -HUGE],
    "the largest": [HUGE],
    "the most negative": [-HUGE],
    "beyond the largest and back": [HUGE, HUGE, -HUGE],
    "half a unit, ties to even": [1.0, 2**-53],
    "half a unit and a little": [1.0, 2**-53, TINY],
    "just below half a unit": [1.0, 2**-53, -TINY],
    "negative": [-1.0, -(2**-53), -TINY],
    "all ones": [float(2**53 - 1), 2.0**-10, float(-(2**53 - 1))],
    "tenths": [0.1] * 10,
}


def total(values: list[float]) -> float:
    return from_limbs(to_limbs(torch.tensor(values, dtype=torch.float64)))


def same(one: float, other: float) -> bool:
    """In every bit, but that a sum of zero has no sign."""
    return struct.pack("d", one + 0.0) == struct.pack("d", other + 0.0)


def fsum(values: list[float]) -> float:
    """``math.fsum``, which gives up where a partial sum overflows: exact all the same."""
    return float(sum((Fraction(value) for value in values), Fraction(0)))


@pytest.mark.parametrize("values", SUMS.values(), ids=SUMS)
def test_the_sum_is_rounded_once(values: list[float]) -> None:
    assert same(total(values), fsum(values))
    if "beyond" not in str(values) and sum(map(abs, values)) < math.inf:
        assert same(total(values), math.fsum(values))


@pytest.mark.parametrize("values", [values for values in SUMS.values() if 2 <= len(values) <= 4])
def test_neither_order_nor_split_matters(values: list[float]) -> None:
    """All permutations, and of each all ways to give a part to another rank: the limbs themselves are the same."""
    whole = to_limbs(torch.tensor(values, dtype=torch.float64))
    for order in itertools.permutations(values):
        for split in range(len(values) + 1):
            parts = [torch.tensor(part, dtype=torch.float64) for part in (order[:split], order[split:])]
            assert torch.equal(to_limbs(parts[0]) + to_limbs(parts[1]), whole)


def test_plain_sums_do_depend_on_the_order() -> None:
    """Negative control: the numbers above tell orders apart."""
    values = SUMS["cancellation"]
    assert len({sum(order) for order in itertools.permutations(values)}) > 1


def random_floats(seed: int, count: int) -> list[float]:
    """Any finite float64 but the very largest: uniform over bit patterns."""
    numbers = random.Random(seed)
    values: list[float] = []
    while len(values) < count:
        (value,) = struct.unpack("d", numbers.getrandbits(64).to_bytes(8, "little"))
        if math.isfinite(value) and abs(value) < 1e300:
            values.append(value)
    return values


@pytest.mark.parametrize("seed", range(5))
def test_random_bit_patterns(seed: int) -> None:
    values = random_floats(seed, 2000)
    values += [-value for value in values[1000:]]  # the large ones cancel, so that small ones show
    values += [value * 2.0**-40 for value in values[:50]]
    assert same(total(values), math.fsum(values))
    shuffled = random.Random(seed + 1).sample(values, len(values))
    limbs = torch.stack([to_limbs(torch.tensor(shuffled[i::7], dtype=torch.float64)) for i in range(7)]).sum(dim=0)
    assert torch.equal(limbs, to_limbs(torch.tensor(values, dtype=torch.float64)))


def test_many_numbers_in_one_limb_do_not_overflow() -> None:
    """A million mantissas of 53 ones, of either sign: every limb is far from 2^63."""
    value = (2**53 - 1) / 2**53
    limbs = to_limbs(torch.full((1_000_000,), value, dtype=torch.float64))
    assert from_limbs(limbs) == float(Fraction(value) * 1_000_000)
    assert from_limbs(to_limbs(torch.full((1_000_000,), -value, dtype=torch.float64))) == -from_limbs(limbs)
    # 2^29 numbers, the most that may enter: as many as 512 rows of 2^20 numbers, by the largest limb of one.
    assert int(limbs.abs().max()) / 1_000_000 * 2**29 < 2**63


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_every_sum_it_enters(special: float) -> None:
    assert math.isnan(total([1.0, special, 2.0]))
    assert math.isnan(total([math.inf, -math.inf]))
    rest = to_limbs(torch.tensor([3.0], dtype=torch.float64))
    limbs: Tensor = to_limbs(torch.tensor([special], dtype=torch.float64)) + rest
    assert math.isnan(from_limbs(limbs))
    assert from_limbs(rest) == 3.0


def test_a_sum_beyond_float64_is_infinite() -> None:
    assert total([HUGE, HUGE]) == math.inf and total([-HUGE, -HUGE]) == -math.inf
    assert total([HUGE, 2.0**969]) == HUGE  # below half a unit of the largest
    assert total([HUGE, 2.0**970]) == math.inf  # a tie rounds up, as in fsum's arithmetic


def test_shape_dtype_and_length() -> None:
    limbs = to_limbs(torch.ones(2, 3, 4, dtype=torch.float64))
    assert limbs.dtype == torch.int64 and limbs.shape == (LENGTH,) and from_limbs(limbs) == 24.0
    with pytest.raises(AssertionError):
        to_limbs(torch.ones(3))
