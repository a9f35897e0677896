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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", [0, 1, 2])
def test_the_kernel_has_the_bits_of_the_reference(isa: int, dtype: torch.dtype) -> None:
    values = _values(1001, dtype)
    assert torch.equal(torch.ops.megatron_lite_cpu.block_squares(values, isa), block_squares_reference(values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sum_is_finite_where_the_numbers_are(dtype: torch.dtype) -> None:
    """So that the norm is the check for overflow."""
    values = torch.full((4 * BLOCK,), torch.finfo(dtype).max, dtype=dtype)
    assert block_squares(values).isfinite().all()
    for place, wrong in ((3, math.inf), (BLOCK + 200, -math.inf), (3 * BLOCK - 1, math.nan)):
        values[place] = wrong
    assert block_squares(values).isfinite().tolist() == [False, False, False, True]


def test_strided_values() -> None:
    values = _values(4)
    assert torch.equal(block_squares(values.repeat_interleave(2)[::2]), block_squares(values))


@pytest.mark.skipif(
    dispatch.select("block_squares", "auto", torch.float32, "cpu").backend != "cpu", reason="no native library"
)
def test_operator_registrations() -> None:
    torch.library.opcheck(torch.ops.megatron_lite.block_squares_cpu.default, (_values(3),))


@pytest.mark.parametrize("values", [torch.ones(255), torch.ones(2, BLOCK), torch.ones(BLOCK, dtype=torch.int32)])
def test_bad_input(values: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="block_squares: values is"):
        block_squares(values)


def test_backends_that_are_not_there_are_named() -> None:
    for backend in ("cuda", "triton"):
        with pytest.raises(ValueError, match=f"block_squares={backend} cannot run"):
            block_squares(_values(1), backend)
