from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from megatron_lite.ops import native
from megatron_lite.ops.exact_sum import exact_sum, exact_sum_reference
from megatron_lite.utils.exact import LENGTH, from_limbs


def _values(size: int) -> torch.Tensor:
    """Of all sizes that float64 has, subnormal numbers and zeros among them."""
    generator = torch.Generator().manual_seed(size)
    exponents = torch.randint(-1080, 1000, (size,), generator=generator)
    values = torch.ldexp(torch.randn(size, generator=generator, dtype=torch.float64), exponents)
    values[: size // 10] = 0
    return values


@pytest.mark.parametrize("size", [0, 1, 100, 40_003])
def test_the_limbs_are_those_of_the_reference(size: int) -> None:
    values = _values(size)
    limbs = exact_sum(values)
    assert limbs.shape == (LENGTH,) and torch.equal(limbs, exact_sum_reference(values))
    assert from_limbs(limbs) == float(sum(map(Fraction, values.tolist())))


@pytest.mark.skipif(native.missing_cpu() is not None, reason=str(native.missing_cpu()))
@pytest.mark.parametrize("isa", [0, 1, 2])
def test_every_instruction_set(isa: int) -> None:
    values = _values(1001)
    values[13:16] = torch.tensor([math.nan, math.inf, -math.inf])
    limbs = torch.ops.megatron_lite_cpu.exact_sum(values, isa)
    assert torch.equal(limbs, exact_sum_reference(values)) and limbs[-1] == 3
    assert math.isnan(from_limbs(limbs))


def test_extreme_numbers() -> None:
    largest, least = torch.finfo(torch.float64).max, 5e-324
    for numbers in ([largest, -largest], [least] * 3, [1.0, least, -1.0], [-largest, least], [2.0**-1022, -least]):
        values = torch.tensor(numbers, dtype=torch.float64)
        assert from_limbs(exact_sum(values)) == float(sum(map(Fraction, numbers)))
    # Negative control: plain additions lose the small one.
    assert float(torch.tensor([1.0, least, -1.0], dtype=torch.float64).sum()) == 0.0 != least


@pytest.mark.parametrize("values", [torch.ones(4), torch.ones(2, 2).double(), torch.ones(8).double()[::2]])
def test_bad_input(values: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"exact_sum: values is .* it takes contiguous fp64"):
        exact_sum(values)
