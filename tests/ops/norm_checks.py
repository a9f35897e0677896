"""What the tests of the two norms share: they differ in their parameters alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megatron_lite.ops import norm_kernels
from tests.ops.oracle import assert_same_bits, assert_within, check_against_plain, run_with_gradients

EPS = 1e-5
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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


def check_addition(subject: Subject, dtype: torch.dtype) -> None:
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


def check_layouts(subject: Subject, dtype: torch.dtype) -> None:
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


def check_bits(subject: Subject, dtype: torch.dtype) -> None:
    """The same bits twice and for any number of threads."""
    inputs = subject.inputs((259, 111), dtype)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            runs.append(run_with_gradients(subject.op, inputs))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert_same_bits(runs[0], run)


def check_every_instruction_set(subject: Subject, isa: int, dtype: torch.dtype) -> None:
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


def check_registrations(subject: Subject, dtype: torch.dtype) -> None:
    x, residual, *parameters = subject.inputs((6, 40), dtype)
    total, _, *numbers = getattr(torch.ops.megatron_lite_cpu, f"add_{subject.norm}")(x, residual, *parameters, EPS)
    operators = torch.ops.megatron_lite
    backward = getattr(operators, f"add_{subject.norm}_cpu_backward").default
    torch.library.opcheck(backward, (x, residual, total, parameters[0], *numbers))
    leaves = [t.requires_grad_() for t in (x.view(2, 3, 40), residual.view(2, 3, 40), *parameters)]
    torch.library.opcheck(getattr(operators, f"add_{subject.norm}_cpu").default, (*leaves, EPS))
    compiled = torch.compile(subject.op, fullgraph=True, backend="aot_eager")
    assert_same_bits(run_with_gradients(compiled, leaves), run_with_gradients(subject.op, leaves))


def check_bad_input(subject: Subject) -> None:
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
    for message, arguments in wrong:
        with pytest.raises(ValueError, match=message):
            subject.op(*arguments)
    raw = getattr(torch.ops.megatron_lite_cpu, name)
    for arguments in (
        [x, residual[:, :8], *parameters],
        [x, residual, weight[:8], *bias],
        [x.long(), residual, *parameters],
    ):
        with pytest.raises(RuntimeError):
            raw(*arguments, EPS)


def check_control(subject: Subject) -> None:
    """Negative controls: the sum's own gradient is lost; the norm is of x alone."""

    def loses(x: Tensor, residual: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        total, y = subject.op(x, residual, *parameters)
        return total.detach() + 0 * x, y

    def forgets(x: Tensor, residual: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return x + residual, subject.op(x, torch.zeros_like(x), *parameters)[1]

    for wrong, message in ((loses, "gradient of input 0"), (forgets, "output 1")):
        with pytest.raises(AssertionError, match=message):
            check_against_plain(wrong, subject.plain, subject.inputs((3, 512), torch.bfloat16))


def check_apex(
    monkeypatch: pytest.MonkeyPatch, subject: Subject, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    """With a module in apex's place that has its functions' names, arguments and dtypes of results."""
    import sys
    from types import ModuleType

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
    monkeypatch.setattr(
        "megatron_lite.ops.dispatch.select", lambda *_: __import__("types").SimpleNamespace(backend="apex")
    )
    x, residual, *parameters = subject.inputs((3, 16), dtype)
    parameters = [p.to(weight_dtype) for p in parameters]
    actual, expected = subject.op(x, residual, *parameters), subject.plain(x, residual, *parameters)
    assert_same_bits(actual, expected)
    assert calls == [f"{'' if dtype == weight_dtype else 'mixed_dtype_'}fused_{subject.norm}_affine"]
