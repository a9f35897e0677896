from __future__ import annotations

import pytest
import torch

from megatron_lite.ops import dispatch
from megatron_lite.ops.accumulate import accumulate, accumulate_reference

SIZES = [0, 1, 15, 16, 4099, 100_003]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_the_bits_are_those_of_the_reference(dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    values = torch.randn(size, generator=generator).to(dtype)
    total = torch.randn(size, generator=generator, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    expected = total.clone()
    accumulate_reference(expected, values)
    accumulate(total, values)
    assert torch.equal(total, expected)


@pytest.mark.skipif(
    dispatch.select("accumulate", "auto", torch.bfloat16, "cpu").backend != "cpu", reason="no native library"
)
@pytest.mark.parametrize("isa", [0, 1, 2])
def test_every_instruction_set_adds_alike(isa: int) -> None:
    values, total = torch.randn(1001).bfloat16(), torch.zeros(1001)
    torch.ops.megatron_lite_cpu.accumulate(total, values, isa)
    assert torch.equal(total, values.float())


def test_strided_values() -> None:
    values, total = torch.randn(7, 40).bfloat16().t(), torch.ones(40, 7)
    accumulate(total, values)
    assert torch.equal(total, 1 + values.float())


@pytest.mark.parametrize(
    ("total", "values"),
    [
        (torch.ones(4), torch.ones(3)),
        (torch.ones(4), torch.ones(4, dtype=torch.int32)),
        (torch.ones(4).half(), torch.ones(4).half()),
    ],
)
def test_bad_input(total: torch.Tensor, values: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"accumulate: (values|total) is"):
        accumulate(total, values)


def test_autograd_sees_that_the_total_was_written() -> None:
    total, scale = torch.ones(8), torch.ones(8, requires_grad=True)
    product = scale * total
    accumulate(total, torch.ones(8, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
