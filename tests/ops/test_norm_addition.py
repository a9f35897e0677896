"""The two norms with an addition before them: they differ in their parameters alone."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_lite.ops import add_layer_norm, add_rms_norm, native, norm_kernels
from megatron_lite.ops.layer_norm import add_layer_norm_reference
from megatron_lite.ops.rms_norm import add_rms_norm_reference
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
SHAPES = ((1, 512), (3, 40), (4099, 59), (31, 32), (33, 1), (65, 4096), (7, 10_007), (2, 3, 5, 48))


@dataclass(frozen=True)
class Subject:
    """A norm with an addition before it: `op` and `plain` take (x, residual, *parameters)."""

    norm: str
    op: Callable[..., tuple[Tensor, Tensor]]
    plain: Callable[..., tuple[Tensor, Tensor]]
    has_bias: bool

    def inputs(self, shape: Sequence[int], dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
        torch.manual_seed(sum(shape))
        dim = shape[-1]
        parameters = [1 + 0.1 * torch.randn(dim), torch.randn(dim)][: 2 if self.has_bias else 1]
        rows = [torch.randn(*shape) * scale + 0.5 for _ in range(2)]
        return [t.to(dtype) for t in (*rows, *parameters)]


RMS_NORM = Subject(
    "rms_norm",
    functools.partial(add_rms_norm, eps=EPS),
    functools.partial(add_rms_norm_reference, eps=EPS),
    has_bias=False,
)
LAYER_NORM = Subject(
    "layer_norm",
    functools.partial(add_layer_norm, eps=EPS),
    functools.partial(add_layer_norm_reference, eps=EPS),
    has_bias=True,
)
BOTH = pytest.mark.parametrize("subject", [RMS_NORM, LAYER_NORM], ids=lambda subject: subject.norm)
needs_native = pytest.mark.skipif(native.missing_cpu() is not None, reason=str(native.missing_cpu()))


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_exact_as_plain_torch(subject: Subject, dtype: torch.dtype) -> None:
    """Against float64, at odd shapes and large values; the sum is rounded before it is normalised."""
    for shape in SHAPES:
        check_against_plain(subject.op, subject.plain, subject.inputs(shape, dtype))
    check_against_plain(subject.op, subject.plain, subject.inputs((5, 111), dtype, scale=1e4))
    x, residual, *parameters = subject.inputs((9, 111), dtype)
    x[1] = residual[1] = 0
    total, y = subject.op(x, residual, *parameters)
    assert torch.equal(total, x + residual)
    assert_within("y of the sum", y, *(subject.plain(total * 0, total.to(k), *(p.to(k) for p in parameters))[1]
                                       for k in (dtype, torch.float64)), factor=2.0)  # fmt: skip
    assert all(torch.isfinite(t).all() for t in run_with_gradients(subject.op, [x, residual, *parameters]))


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_no_rows(subject: Subject, dtype: torch.dtype) -> None:
    """Strided and expanded inputs, and no rows."""
    x, residual, *parameters = subject.inputs((12, 118), dtype)
    parameters = [p[:59] for p in parameters]
    strided = x.view(3, 4, 118)[..., ::2].transpose(0, 1)
    expanded = residual[:1, :59].expand(4, 3, 59)
    expected = subject.op(strided.contiguous(), expanded.contiguous(), *parameters)
    assert_same_bits(subject.op(strided, expanded, *parameters), expected)
    none = torch.empty(0, 59, dtype=dtype)
    total, y, *gradients = run_with_gradients(subject.op, [none, none, *parameters])
    assert total.shape == y.shape == gradients[0].shape == (0, 59)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients[2:])


@BOTH
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_deterministic_and_independent_of_threads(subject: Subject, dtype: torch.dtype) -> None:
    same_bits_for_any_threads(subject.op, subject.inputs((259, 111), dtype))


@needs_native
@BOTH
@pytest.mark.parametrize("isa", [0, 1, 2, 3], ids=["portable", "avx2", "avx512", "avx512bf16"])
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_every_instruction_set(subject: Subject, isa: int, dtype: torch.dtype) -> None:
    """A set that this CPU lacks runs as the best below it. Seven rows take other code than one, to the same bits."""
    raw = torch.ops.megatron_lite_cpu
    for dim in (111, 128):
        x, residual, *parameters = subject.inputs((7, dim), dtype)
        dsum, dy = torch.randn(7, dim).to(dtype), torch.randn(7, dim).to(dtype)

        def run(rows: slice) -> list[Tensor]:
            total, y, *numbers = getattr(raw, f"add_{subject.norm}")(x[rows], residual[rows], *parameters, EPS, isa)  # noqa: B023
            backward = getattr(raw, f"add_{subject.norm}_backward")
            return [total, y, *backward(dy[rows], dsum[rows], total, parameters[0], *numbers, isa)]  # noqa: B023

        def reference(kind: torch.dtype) -> list[Tensor]:
            leaves = [t.to(kind).requires_grad_() for t in (x, residual, *parameters)]  # noqa: B023
            outputs = subject.plain(*leaves)
            gradients = torch.autograd.grad(outputs, leaves, [dsum.to(kind), dy.to(kind)])  # noqa: B023
            return [*(o.detach() for o in outputs), *gradients[1:]]

        actual = run(slice(None))
        for i, (a, p, e) in enumerate(zip(actual, reference(dtype), reference(torch.float64), strict=True)):
            assert_within(f"result {i} of dim {dim}", a, p, e, factor=3.0)
        for row in range(7):
            assert_same_bits([t[row].clone() for t in actual[:3]], [t[0].clone() for t in run(slice(row, row + 1))[:3]])


@needs_native
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operator_registrations(subject: Subject, dtype: torch.dtype) -> None:
    x, residual, *parameters = subject.inputs((6, 40), dtype)
    total, _, *numbers = getattr(torch.ops.megatron_lite_cpu, f"add_{subject.norm}")(x, residual, *parameters, EPS)
    operators = torch.ops.megatron_lite
    backward = getattr(operators, f"add_{subject.norm}_cpu_backward").default
    torch.library.opcheck(backward, (x, residual, total, parameters[0], *numbers))
    leaves = [t.requires_grad_() for t in (x.view(2, 3, 40), residual.view(2, 3, 40), *parameters)]
    torch.library.opcheck(getattr(operators, f"add_{subject.norm}_cpu").default, (*leaves, EPS))
    compiled = torch.compile(subject.op, fullgraph=True, backend="aot_eager")
    assert_same_bits(run_with_gradients(compiled, leaves), run_with_gradients(subject.op, leaves))


@BOTH
def test_gradcheck_in_float64(subject: Subject) -> None:
    leaves = [t.requires_grad_() for t in subject.inputs((3, 7), torch.float64)]
    assert torch.autograd.gradcheck(subject.op, leaves)


@needs_native
@BOTH
def test_bad_input(subject: Subject) -> None:
    """Each is a ValueError that says what was given and what is taken; the raw operator refuses it too."""
    x, residual, weight, *bias = subject.inputs((4, 16), torch.float16)
    name = f"add_{subject.norm}"
    parameters = [weight, *bias]
    wrong = [
        (f"{name}: residual is .4, 8. fp16 on cpu; it takes the shape of x", [x, residual[:, :8], *parameters]),
        (f"{name}: residual is .4, 16. fp32 on cpu; it takes the dtype", [x, residual.float(), *parameters]),
        (f"{name}: weight is .8. fp16 on cpu; it takes .D. = .16.", [x, residual, weight[:8], *bias]),
        (f"{name}: weight is .16. bf16", [x, residual, weight.bfloat16(), *bias]),
        (f"{name}: x is .4, 16. int64", [x.long(), residual.long(), *parameters]),
    ]
    sparse = {
        "x": [x.to_sparse(), residual, *parameters],
        "residual": [x, residual.to_sparse(), *parameters],
        "weight": [x, residual, weight.to_sparse(), *bias],
    }
    wrong += [(f"{name}: {argument} is .* sparse_coo", arguments) for argument, arguments in sparse.items()]
    for message, arguments in wrong:
        with pytest.raises(ValueError, match=message):
            subject.op(*arguments)
    for eps in (math.nan, -1e-5, math.inf):
        with pytest.raises(ValueError, match=f"{name}: eps is {eps}; it takes a finite number, 0 or more"):
            subject.op(x, residual, *parameters, eps=eps)
    raw = getattr(torch.ops.megatron_lite_cpu, name)
    for arguments in (
        [x, residual[:, :8], *parameters],
        [x, residual, weight[:8], *bias],
        [x.long(), residual, *parameters],
    ):
        with pytest.raises(RuntimeError):
            raw(*arguments, EPS)


@BOTH
def test_the_rule_catches_a_lost_gradient_and_a_forgotten_residual(subject: Subject) -> None:
    """Negative controls: the sum's own gradient is lost; the norm is of x alone."""

    def loses(x: Tensor, residual: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        total, y = subject.op(x, residual, *parameters)
        return total.detach() + 0 * x, y

    def forgets(x: Tensor, residual: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return x + residual, subject.op(x, torch.zeros_like(x), *parameters)[1]

    for wrong, message in ((loses, "gradient of input 0"), (forgets, "output 1")):
        with pytest.raises(AssertionError, match=message):
            check_against_plain(wrong, subject.plain, subject.inputs((3, 512), torch.bfloat16))


@BOTH
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_apex_is_called_as_it_wants_to_be(
    monkeypatch: pytest.MonkeyPatch, subject: Subject, weight_dtype: torch.dtype
) -> None:
    """With a module in apex's place that has its functions' names, arguments and dtypes of results."""
    dtype = torch.bfloat16
    stand_in, calls = ModuleType(norm_kernels.APEX), []

    def function(name: str) -> Callable[..., Tensor]:
        def affine(x: Tensor, *rest: Tensor, memory_efficient: bool = False) -> Tensor:
            *parameters, shape, eps = rest
            assert tuple(shape) == x.shape[-1:] and eps == EPS
            calls.append(name)
            y = subject.plain(torch.zeros_like(x), x, *parameters)[1]
            return y.to(parameters[0].dtype if name.startswith("mixed") else x.dtype)

        return affine

    for name in (f"fused_{subject.norm}_affine", f"mixed_dtype_fused_{subject.norm}_affine"):
        setattr(stand_in, name, function(name))
    monkeypatch.setitem(sys.modules, norm_kernels.APEX, stand_in)
    monkeypatch.setattr("megatron_lite.ops.dispatch.select", lambda *_: SimpleNamespace(backend="apex"))
    x, residual, *parameters = subject.inputs((3, 16), dtype)
    parameters = [p.to(weight_dtype) for p in parameters]
    actual, expected = subject.op(x, residual, *parameters), subject.plain(x, residual, *parameters)
    assert_same_bits(actual, expected)
    assert calls == [f"{'' if dtype == weight_dtype else 'mixed_dtype_'}fused_{subject.norm}_affine"]
