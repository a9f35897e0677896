from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from megatron_lite.ops import layer_norm
from megatron_lite.ops.layer_norm import layer_norm_reference
from tests.ops.oracle import assert_same_bits, check_against_plain, run_with_gradients

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
op = functools.partial(layer_norm, eps=1e-5)
plain = functools.partial(layer_norm_reference, eps=1e-5)


def inputs(rows: int, dim: int, dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    torch.manual_seed(rows * 10_000 + dim)
    return [
        (torch.randn(rows, dim) * scale + 0.5).to(dtype),
        torch.rand(dim).to(dtype) + 0.5,
        torch.randn(dim).to(dtype),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "dim"), [(1, 512), (3, 40), (4099, 59), (33, 111)])
def test_error_is_at_most_twice_that_of_plain_torch(rows: int, dim: int, dtype: torch.dtype) -> None:
    check_against_plain(op, plain, inputs(rows, dim, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_values_and_rows_of_zeros(dtype: torch.dtype) -> None:
    x, weight, bias = inputs(5, 111, dtype, scale=1e4)
    x[2] = 0
    check_against_plain(op, plain, [x, weight, bias])
    assert torch.equal(op(x, weight, bias)[2], bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_and_rows_are_independent(dtype: torch.dtype) -> None:
    x, weight, bias = inputs(4099, 59, dtype)
    first = run_with_gradients(op, [x, weight, bias])
    assert_same_bits(first, run_with_gradients(op, [x, weight, bias]))
    assert_same_bits([first[0][:3].clone()], [op(x[:3].clone(), weight, bias)])


def test_gradcheck_in_float64() -> None:
    assert torch.autograd.gradcheck(op, [t.requires_grad_() for t in inputs(3, 7, torch.float64)])


def test_the_rule_catches_the_unbiased_variance() -> None:
    """Negative control: dividing by D - 1 instead of D."""

    def unbiased(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=-1, keepdim=True)
        return (x - mean) * torch.rsqrt(variance + 1e-5) * weight + bias

    with pytest.raises(AssertionError, match="output 0"):
        check_against_plain(unbiased, plain, inputs(3, 512, torch.float32))
