from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite.ops import native, rms_norm
from megatron_lite.ops.rms_norm import rms_norm_reference
from tests.ops.oracle import (
    assert_same_bits,
    assert_within,
    check_against_plain,
    run_with_gradients,
    same_bits_for_any_threads,
)

EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NATIVE_DTYPES = DTYPES[:3]

needs_native = pytest.mark.skipif(native.missing_cpu() is not None, reason=str(native.missing_cpu()))
kernel = functools.partial(rms_norm, eps=EPS)
plain = functools.partial(rms_norm_reference, eps=EPS)


def inputs(rows: int, dim: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rows * 10_000 + dim)
    return (torch.randn(rows, dim) * scale).to(dtype), (1 + 0.1 * torch.randn(dim)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "dim"), [(1, 512), (3, 40), (4099, 59), (4099, 111), (31, 512), (33, 1), (65, 4096)])
def test_error_is_at_most_twice_that_of_plain_torch(rows: int, dim: int, dtype: torch.dtype) -> None:
    check_against_plain(kernel, plain, inputs(rows, dim, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_values_do_not_overflow(dtype: torch.dtype) -> None:
    x, weight = inputs(5, 111, dtype, scale=1e4)
    check_against_plain(kernel, plain, (x, weight))
    assert torch.isfinite(kernel(x, weight)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_zeros(dtype: torch.dtype) -> None:
    x, weight = inputs(4, 40, dtype)
    x[1] = 0
    results = run_with_gradients(kernel, (x, weight))
    assert torch.equal(results[0][1], torch.zeros(40, dtype=dtype))
    assert all(torch.isfinite(t).all() for t in results)
    check_against_plain(kernel, plain, (x, weight))


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_strided_input_and_leading_dimensions(dtype: torch.dtype) -> None:
    x, weight = inputs(12, 118, dtype)
    strided = x.view(3, 4, 118)[..., ::2].transpose(0, 1)
    assert not strided.is_contiguous()
    assert_same_bits([kernel(strided, weight[:59])], [kernel(strided.contiguous(), weight[:59])])
    check_against_plain(kernel, plain, (strided, weight[:59]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weight_may_be_fp32(dtype: torch.dtype) -> None:
    x, weight = inputs(7, 111, dtype)
    results = run_with_gradients(kernel, (x, weight.float() + 1e-4))
    assert [t.dtype for t in results] == [dtype, dtype, torch.float32]
    check_against_plain(kernel, plain, (x, weight.float() + 1e-4))


def test_no_rows() -> None:
    x, weight = torch.empty(0, 16, requires_grad=True), torch.ones(16, requires_grad=True)
    kernel(x, weight).sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 16)
    assert weight.grad is not None and torch.equal(weight.grad, torch.zeros(16))


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_deterministic_and_independent_of_the_number_of_threads(dtype: torch.dtype) -> None:
    same_bits_for_any_threads(kernel, inputs(4099, 512, dtype))


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_number_of_rows(dtype: torch.dtype) -> None:
    x, weight = inputs(4099, 111, dtype)
    whole = run_with_gradients(kernel, (x, weight))
    part = run_with_gradients(kernel, (x[:5].clone(), weight))
    assert_same_bits([whole[0][:5].clone()], [part[0]])


@needs_native
@pytest.mark.parametrize("isa", [0, 1, 2, 3], ids=["portable", "avx2", "avx512", "avx512bf16"])
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_every_instruction_set(isa: int, dtype: torch.dtype) -> None:
    """A set that this CPU lacks runs as the best below it, so that the test cannot be empty."""
    x, weight = inputs(67, 111, dtype)
    d_y = torch.randn(67, 111).to(dtype)
    y, rstd = torch.ops.megatron_lite_cpu.rms_norm(x, weight, EPS, isa)
    dx, dweight = torch.ops.megatron_lite_cpu.rms_norm_backward(d_y, x, weight, rstd, isa)

    def reference(kind: torch.dtype) -> list[Tensor]:
        leaves = [x.to(kind).requires_grad_(), weight.to(kind).requires_grad_()]
        out = plain(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, d_y.to(kind))]

    names = ("y", "dx", "dweight")
    for name, a, p, e in zip(names, (y, dx, dweight), reference(dtype), reference(torch.float64), strict=True):
        assert_within(name, a, p, e, factor=3.0)


@needs_native
@pytest.mark.parametrize("isa", range(4))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_a_16_bit_format_is_loaded_and_stored_right(dtype: torch.dtype, isa: int) -> None:
    """swiglu with a huge gate is the identity times the gate: 32 * up, which is exact, or infinite, or NaN.

    The instruction of AVX512-BF16 that makes bf16 makes zeros of what is below the normal numbers.
    """
    up = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    gate = torch.full_like(up, 32.0)
    actual = torch.ops.megatron_lite_cpu.swiglu(torch.cat((gate, up)), 0, isa)
    expected = up * gate
    if dtype == torch.bfloat16 and min(isa, torch.ops.megatron_lite_cpu.instruction_set()) == 3:
        expected = torch.where(expected.abs() < torch.finfo(dtype).tiny, 0, expected)
    assert torch.equal(torch.nan_to_num(actual, nan=7.0), torch.nan_to_num(expected, nan=7.0))


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_to_nearest_even(dtype: torch.dtype) -> None:
    """A 16-bit input with an fp32 weight of one row makes y = x r w take every rounding; torch's cast is the oracle."""
    torch.manual_seed(0)
    weight = torch.cat((torch.randn(50_000).exp(), torch.randn(50_000) * 1e-6, torch.randn(500) * 1e5))
    x = torch.ones(1, weight.numel(), dtype=dtype)
    y, _ = torch.ops.megatron_lite_cpu.rms_norm(x, weight, 0.0)
    assert torch.equal(y[0], weight.to(dtype))


def test_gradcheck_in_float64() -> None:
    x, weight = inputs(3, 7, torch.float64)
    assert torch.autograd.gradcheck(kernel, (x.requires_grad_(), weight.requires_grad_()))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operator_registrations(dtype: torch.dtype) -> None:
    x, weight = inputs(6, 40, dtype)
    y, rstd = torch.ops.megatron_lite_cpu.rms_norm(x, weight, EPS)
    torch.library.opcheck(torch.ops.megatron_lite.rms_norm_cpu_backward.default, (y, x, weight, rstd))
    arguments = (x.view(2, 3, 40).requires_grad_(), weight.requires_grad_(), EPS)
    torch.library.opcheck(torch.ops.megatron_lite.rms_norm_cpu.default, arguments)


@pytest.mark.parametrize("eps", [None, "1e-5", True, 10**400, -1.0], ids=lambda eps: str(eps)[:8])
def test_an_eps_that_is_none(eps: Any) -> None:
    with pytest.raises(ValueError, match=rf"^rms_norm: eps is {eps!r}; it takes a finite number, 0 or more$"):
        rms_norm(torch.ones(2, 8), torch.ones(8), eps)


@needs_native
def test_a_second_derivative_is_refused() -> None:
    x, weight = (t.requires_grad_() for t in inputs(2, 8, torch.float32))
    (dx,) = torch.autograd.grad(kernel(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no gradient"):
        dx.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiles_without_a_graph_break(dtype: torch.dtype) -> None:
    arguments = inputs(6, 40, dtype)
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
    assert_same_bits(run_with_gradients(compiled, arguments), run_with_gradients(kernel, arguments))


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("wrong", ["output", "gradient of x", "gradient of the weight"])
def test_the_rule_catches_an_error_of_four_units(dtype: torch.dtype, wrong: str) -> None:
    """Negative control: a kernel whose result, or one gradient, is off by a few roundings fails the comparison."""
    off = 1 + 16 * torch.finfo(dtype).eps

    class Perturbed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(x, weight)
            return kernel(x, weight) * (off if wrong == "output" else 1)

        @staticmethod
        def backward(ctx, dy):  # type: ignore[no-untyped-def]
            leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            with torch.enable_grad():
                dx, dweight = torch.autograd.grad(kernel(*leaves), leaves, dy)
            return dx * (off if wrong == "gradient of x" else 1), dweight * (off if "weight" in wrong else 1)

    with pytest.raises(AssertionError, match="output 0" if wrong == "output" else "gradient of input"):
        check_against_plain(Perturbed.apply, plain, inputs(3, 512, dtype))
