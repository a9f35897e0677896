from __future__ import annotations

import math

import pytest
import torch

from megatron_lite.ops import dispatch
from megatron_lite.ops.block_squares import BLOCK, block_squares, block_squares_reference


def _values(blocks: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(blocks)
    return (torch.randn(blocks * BLOCK, generator=generator, dtype=torch.float64) ** 5).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_are_right(dtype: torch.dtype) -> None:
    values = _values(7, dtype)
    exact = [math.fsum(float(x) ** 2 for x in block) for block in values.view(-1, BLOCK)]
    # 8 levels of additions, each rounding by at most half a unit of 2^-52.
    torch.testing.assert_close(
        block_squares(values), torch.tensor(exact, dtype=torch.float64), rtol=8 * 2.0**-53, atol=0
    )


@pytest.mark.skipif(
    dispatch.select("block_squares", "auto", torch.float32, "cpu").backend != "cpu", reason="no native library"
)
@pytest.mark.parametrize("isa", [0, 1, 2])
def test_the_kernel_has_the_bits_of_the_reference(isa: int) -> None:
    values = _values(1001)
    assert torch.equal(torch.ops.megatron_lite_cpu.block_squares(values, isa), block_squares_reference(values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_block_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    values = _values(600, dtype)
    whole = block_squares(values)
    for first, last in ((0, 1), (5, 6), (1, 599), (513, 600)):
        assert torch.equal(block_squares(values[first * BLOCK : last * BLOCK]), whole[first:last])
    # Negative control: a plain sum over the whole does depend on where it is cut.
    squares = values.double() ** 2
    cuts = {float(squares[:cut].sum() + squares[cut:].sum()) for cut in range(0, values.numel(), 77)}
    assert len(cuts) > 1


def test_nothing_gives_nothing() -> None:
    assert block_squares(torch.empty(0)).shape == (0,)
