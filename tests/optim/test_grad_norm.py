from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_lite.optim.grad_norm import BLOCK, clip_factor, sum_of_squares
from megatron_lite.utils.exact import LENGTH, from_limbs

SIZE = 24 * BLOCK


def gradient(dtype: torch.dtype = torch.float32, size: int = SIZE) -> Tensor:
    """Over some orders of magnitude, so that an order of additions shows and yet every element counts."""
    generator = torch.Generator().manual_seed(3)
    sizes = 10.0 ** torch.randint(-2, 2, (size,), generator=generator).double()
    return (torch.randn(size, generator=generator, dtype=torch.float64) * sizes).to(dtype)


def norm(limbs: Tensor) -> float:
    return math.sqrt(from_limbs(limbs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_norm_is_the_exact_one(dtype: torch.dtype) -> None:
    """Within 1e-15 of correctly rounded squares, correctly summed."""
    for values in (gradient(dtype), torch.randn(SIZE).to(dtype)):
        exact = math.sqrt(math.fsum(float(x) ** 2 for x in values))
        assert norm(sum_of_squares(values, [])) == pytest.approx(exact, rel=1e-15)
        torchs = torch.linalg.vector_norm(values.double()).item()
        assert norm(sum_of_squares(values, [])) == pytest.approx(torchs, rel=2e-15)  # torch's own rounding on top


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_slicing_and_order_change_no_bit(dtype: torch.dtype) -> None:
    values = gradient(dtype)
    whole = sum_of_squares(values, [])
    for num_slices in (2, 3, 4, 8, 24):
        parts = [sum_of_squares(part, []) for part in values.chunk(num_slices)]
        for ordered in (parts, parts[::-1], parts[1::2] + parts[::2]):
            total = torch.zeros(LENGTH, dtype=torch.int64)
            for part in ordered:
                total += part
            assert torch.equal(total, whole) and from_limbs(total) == from_limbs(whole)
    # Negative control: the same numbers in another order give another float64 sum.
    squares = values.double().square().tolist()
    assert sum(squares) != sum(reversed(squares))


def test_long_gradients_are_worked_on_in_parts() -> None:
    """Longer than what is worked on at once, and not a multiple of it; an interval that spans the border."""
    size = (1 << 17) + 3 * BLOCK
    values = gradient(size=size)
    skipped = (1 << 17) - 100, (1 << 17) + 100
    counted = values.double().clone()
    counted[slice(*skipped)] = 0
    halves = [sum_of_squares(part, []) for part in counted.split(5 * BLOCK)]
    found = from_limbs(sum_of_squares(values, [skipped]))
    assert found == from_limbs(torch.stack(halves).sum(dim=0)) != from_limbs(sum_of_squares(values, []))


def test_what_does_not_count_is_left_out_wherever_it_lies() -> None:
    values = gradient(torch.float64)
    for skipped in ([(0, 5)], [(10, 300), (700, 701)], [(SIZE - 3, SIZE)], [(0, SIZE)]):
        kept = values.clone()
        for start, stop in skipped:
            kept[start:stop] = 0
        found = from_limbs(sum_of_squares(values, skipped))
        assert found == from_limbs(sum_of_squares(kept, [])) != from_limbs(sum_of_squares(values, []))


def test_two_intervals_in_one_block_are_both_left_out() -> None:
    values = gradient(torch.float64)
    kept = values.clone()
    kept[10:20], kept[30:40] = 0, 0
    assert from_limbs(sum_of_squares(values, [(10, 20), (30, 40)])) == from_limbs(sum_of_squares(kept, []))


def test_the_gradient_is_not_changed() -> None:
    values = gradient(torch.float64)
    before = values.clone()
    sum_of_squares(values, [(3, 40)])
    assert torch.equal(values, before)


def test_large_and_small_gradients() -> None:
    """Where float32 squares would overflow or vanish."""
    for size in (1e30, 1e-30):
        assert norm(sum_of_squares(torch.full((BLOCK,), size), [])) == pytest.approx(16 * size, rel=1e-7)
    assert from_limbs(sum_of_squares(torch.zeros(BLOCK), [])) == 0.0
    assert from_limbs(sum_of_squares(torch.zeros(0), [])) == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_hidden(value: float) -> None:
    values = gradient()
    values[777] = value
    assert math.isnan(from_limbs(sum_of_squares(values, [])))
    assert math.isnan(from_limbs(sum_of_squares(values, [(777, 778)]))), "also where another rank counts it"


@pytest.mark.parametrize("max_norm", [0.01, 1.0, 5.0, 5.1, 100.0])
@pytest.mark.parametrize("scale", [0.1, 1.0, 1e6])
def test_clipping_is_that_of_torch(max_norm: float, scale: float) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (2, 3)]
    originals = [torch.tensor([3.0, 0.0]).double() * scale, torch.tensor([0.0, 4.0, 0.0]).double() * scale]
    for parameter, original in zip(parameters, originals, strict=True):
        parameter.grad = original.clone()
    before = float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    factor = clip_factor(before, max_norm)
    assert (factor < 1) == (before + 1e-6 > max_norm)
    for parameter, original in zip(parameters, originals, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, original * factor, rtol=1e-15, atol=0)


def test_zero_turns_clipping_off() -> None:
    assert clip_factor(1e9, 0.0) == 1.0 and clip_factor(0.0, 1.0) == 1.0
