from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from megatron_lite.ops import add_layer_norm, layer_norm, native
from megatron_lite.ops.layer_norm import add_layer_norm_reference, layer_norm_reference
from tests.ops import norm_checks
from tests.ops.oracle import assert_same_bits, check_against_plain, run_with_gradients

needs_native = pytest.mark.skipif(native.missing_cpu() is not None, reason=str(native.missing_cpu()))
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
op = functools.partial(layer_norm, eps=1e-5)
ADDITION = norm_checks.Subject(
    "layer_norm",
    functools.partial(add_layer_norm, eps=1e-5),
    functools.partial(add_layer_norm_reference, eps=1e-5),
    has_bias=True,
)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_addition_is_as_exact_as_plain_torch(dtype: torch.dtype) -> None:
    norm_checks.check_addition(ADDITION, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_addition_of_strided_and_of_no_rows(dtype: torch.dtype) -> None:
    norm_checks.check_layouts(ADDITION, dtype)


@pytest.mark.parametrize("dtype", norm_checks.NATIVE_DTYPES, ids=str)
def test_addition_gives_the_same_bits_again(dtype: torch.dtype) -> None:
    norm_checks.check_bits(ADDITION, dtype)


@needs_native
@pytest.mark.parametrize("isa", [0, 1, 2, 3], ids=["portable", "avx2", "avx512", "avx512bf16"])
@pytest.mark.parametrize("dtype", norm_checks.NATIVE_DTYPES, ids=str)
def test_addition_with_every_instruction_set(isa: int, dtype: torch.dtype) -> None:
    norm_checks.check_every_instruction_set(ADDITION, isa, dtype)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operator_registrations_of_the_addition(dtype: torch.dtype) -> None:
    norm_checks.check_registrations(ADDITION, dtype)


def test_gradcheck_of_the_addition_in_float64() -> None:
    inputs_of = [t.requires_grad_() for t in ADDITION.inputs((3, 7), torch.float64)]
    assert torch.autograd.gradcheck(ADDITION.op, inputs_of)


@needs_native
def test_bad_input() -> None:
    norm_checks.check_bad_input(ADDITION)


def test_the_rule_catches_a_lost_gradient_and_a_forgotten_residual() -> None:
    norm_checks.check_control(ADDITION)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_apex_is_called_as_it_wants_to_be(monkeypatch: pytest.MonkeyPatch, weight_dtype: torch.dtype) -> None:
    norm_checks.check_apex(monkeypatch, ADDITION, torch.bfloat16, weight_dtype)
