from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.ops import native
from megatron_lite.ops.cross_entropy import cross_entropy, cross_entropy_reference
from megatron_lite.ops.cross_entropy_shard import (
    IGNORED_TARGET,
    RowStatistics,
    VocabularyShard,
    local_statistics,
    reduced_losses,
    write_gradient,
)
from tests.ops import cross_entropy_checks
from tests.ops.oracle import assert_same_bits, assert_within, check_against_plain, run_with_gradients

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NATIVE_DTYPES = DTYPES[:3]
CONSTANTS = [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.2, 1e-3)]

needs_native = pytest.mark.skipif(native.missing_cpu() is not None, reason=str(native.missing_cpu()))


def inputs(rows: int, columns: int, dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits and targets, of which every fifth is ignored."""
    torch.manual_seed(rows * 10_000 + columns)
    targets = torch.randint(columns, (rows,))
    targets[2::5] = IGNORED_TARGET
    return (torch.randn(rows, columns) * scale).to(dtype), targets


def pair(targets: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0) -> tuple[Callable, Callable]:
    """The op and its reference as functions of the logits."""
    op = functools.partial(cross_entropy, targets=targets, label_smoothing=label_smoothing, z_loss=z_loss)
    plain = functools.partial(cross_entropy_reference, targets=targets, label_smoothing=label_smoothing, z_loss=z_loss)
    return op, plain


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("label_smoothing", "z_loss"), CONSTANTS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 7), (3, 40), (4099, 59), (31, 1024), (33, 4099), (3, 32_000)])
def test_error_is_at_most_twice_that_of_plain_torch(
    rows: int, columns: int, label_smoothing: float, z_loss: float, dtype: torch.dtype
) -> None:
    logits, targets = inputs(rows, columns, dtype)
    check_against_plain(*pair(targets, label_smoothing, z_loss), [logits])


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_reference_is_that_of_torch(label_smoothing: float) -> None:
    logits, targets = inputs(23, 61, torch.float64)
    expected = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="sum")
    actual = cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="sum")
    torch.testing.assert_close(actual, expected, rtol=1e-14, atol=0)
    z_loss = cross_entropy(logits, targets, z_loss=0.25) - cross_entropy(logits, targets)
    kept = targets != IGNORED_TARGET
    torch.testing.assert_close(z_loss, 0.25 * logits.logsumexp(1).square() * kept, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_large_values_do_not_overflow(dtype: torch.dtype) -> None:
    logits, targets = inputs(7, 111, dtype, scale=1e4)
    op, plain = pair(targets, 0.1)
    check_against_plain(op, plain, [logits])
    assert all(torch.isfinite(t).all() for t in run_with_gradients(op, [logits]))
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(logits, targets, reduction="sum"), logits)
    assert torch.isfinite(gradient).all() and gradient.abs().max() == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_zeros(dtype: torch.dtype) -> None:
    logits, targets = inputs(4, 64, dtype)
    logits[1] = 0
    check_against_plain(*pair(targets), [logits])
    torch.testing.assert_close(cross_entropy(logits, targets)[1].item(), 4.1588830833596715, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_strided_logits_and_leading_dimensions(dtype: torch.dtype) -> None:
    logits, targets = inputs(12, 118, dtype)
    strided, targets = logits.view(3, 4, 118)[..., ::2].transpose(0, 1), (targets % 59).view(3, 4).t()
    assert not strided.is_contiguous() and not targets.is_contiguous()
    op, plain = pair(targets, 0.1, 1e-3)
    assert op(strided).shape == (4, 3)
    assert_same_bits([op(strided)], [op(strided.contiguous())])
    check_against_plain(op, plain, [strided])
    assert op(strided[:1, :1].expand(4, 3, 59)).shape == (4, 3)
    assert cross_entropy(logits[0], torch.tensor(5)).shape == ()


@pytest.mark.parametrize("shape", [(0, 16), (0, 3, 16), (3, 0, 16)], ids=str)
def test_no_rows(shape: tuple[int, ...]) -> None:
    logits = torch.empty(shape, requires_grad=True)
    loss = cross_entropy(logits, torch.empty(shape[:-1], dtype=torch.int64), reduction="sum")
    loss.backward()
    assert loss == 0 and logits.grad is not None and logits.grad.shape == shape


def test_the_sum_is_that_of_the_losses() -> None:
    logits, targets = inputs(4099, 59, torch.bfloat16)
    losses, total = cross_entropy(logits, targets), cross_entropy(logits, targets, reduction="sum")
    assert losses.dtype == torch.float32 and total.dtype == torch.float64 and total == losses.double().sum()
    assert not losses[targets == IGNORED_TARGET].any()


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_deterministic_and_independent_of_threads_and_of_the_chunk(dtype: torch.dtype) -> None:
    """Rows alone, at any place in memory, have the bits that they have among others."""
    logits, targets = inputs(515, 1003, dtype)
    op, before = pair(targets, 0.1, 1e-3)[0], torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            leaf = logits.detach().requires_grad_()
            losses = op(leaf)
            runs.append([losses.detach(), *torch.autograd.grad(losses.double().sum(), leaf)])
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert_same_bits(runs[0], run)
    rows = slice(7, 12)
    leaf = logits[rows].clone().requires_grad_()
    losses = pair(targets[rows], 0.1, 1e-3)[0](leaf)
    part = [losses.detach(), *torch.autograd.grad(losses.double().sum(), leaf)]
    assert_same_bits([t[rows].clone() for t in runs[0]], part)


@needs_native
@pytest.mark.parametrize("isa", [0, 1, 2, 3], ids=["portable", "avx2", "avx512", "avx512bf16"])
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_every_instruction_set(isa: int, dtype: torch.dtype) -> None:
    """A set that this CPU lacks runs as the best below it, so that the test cannot be empty."""

    def statistics(logits: Tensor, targets: Tensor, start: int, size: int) -> Tensor:
        kernel = torch.ops.megatron_lite_cpu.cross_entropy_statistics
        return kernel(logits, targets, start, size, IGNORED_TARGET, isa)

    def gradient(logits: Tensor, targets: Tensor, maxima: Tensor, sums: Tensor, upstream: Tensor, *rest: Any) -> None:
        kernel = torch.ops.megatron_lite_cpu.cross_entropy_gradient
        kernel(logits, targets, maxima, sums, upstream, IGNORED_TARGET, *rest, isa)

    kernels = cross_entropy_checks.Kernels(statistics, gradient)
    assert cross_entropy_checks.check(kernels, dtype) == cross_entropy_checks.NUM_CONTROLS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("label_smoothing", "z_loss"), CONSTANTS)
def test_shards_make_the_whole(label_smoothing: float, z_loss: float, dtype: torch.dtype) -> None:
    """Three shards of 24 of 61 columns, the last padded, reduced by hand, are as accurate as plain torch."""
    logits, targets = inputs(23, 61, dtype)
    width, backend = 24, "reference" if dtype == torch.float64 or native.missing_cpu() else "cpu"
    padded = F.pad(logits, (0, 3 * width - 61), value=50.0)
    parts = [padded[:, start : start + width].contiguous() for start in range(0, 72, width)]
    shards = [VocabularyShard(start, min(width, 61 - start), 61) for start in range(0, 61, width)]
    local = [local_statistics(*one, backend) for one in zip(parts, [targets] * 3, shards, strict=True)]
    maxima = torch.stack([s[0::2] for s in local]).amax(0)
    sums = sum(torch.stack([s[1] * (s[0] - maxima[0]).exp(), s[3]]) for s in local)
    whole = VocabularyShard(0, 61, 61, lambda _: maxima, lambda part: sums[: len(part)])
    losses, statistics = reduced_losses(local[0], targets, whole, label_smoothing, z_loss)
    upstream = torch.ones_like(losses)
    for part, shard in zip(parts, shards, strict=True):
        write_gradient(part, targets, statistics, upstream, shard, label_smoothing, z_loss, part, backend)
    gradient = torch.cat(parts, dim=1)
    assert not gradient[:, 61:].any()

    def expected(x: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.detach().clone().requires_grad_()
        out = cross_entropy_reference(leaf, targets, label_smoothing, z_loss)
        return out.detach(), torch.autograd.grad(out.double().sum(), leaf)[0]

    plain, exact = expected(logits), expected(logits.double())
    assert_within("losses", losses, plain[0], exact[0], 2.0)
    assert_within("gradient", gradient[:, :61].contiguous(), plain[1], exact[1], 3.0)


@pytest.mark.parametrize(("label_smoothing", "z_loss"), CONSTANTS)
def test_gradcheck_in_float64(label_smoothing: float, z_loss: float) -> None:
    """Of the specification, and of the gradient that is written out beside it."""
    logits, targets = inputs(6, 7, torch.float64, scale=1.0)
    assert torch.autograd.gradcheck(pair(targets, label_smoothing, z_loss)[1], logits.requires_grad_())
    shard, upstream = VocabularyShard(0, 7, 7), torch.arange(6, dtype=torch.float64)
    local = local_statistics(logits.detach(), targets, shard, "reference")
    losses, statistics = reduced_losses(local, targets, shard, label_smoothing, z_loss)
    gradient = torch.empty_like(logits)
    constants = (shard, label_smoothing, z_loss)
    write_gradient(logits.detach(), targets, statistics, upstream, *constants, gradient, "reference")
    expected = cross_entropy_reference(logits, targets, label_smoothing, z_loss)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits, upstream)[0], rtol=1e-12, atol=1e-14)
    assert isinstance(statistics, RowStatistics)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operator_registrations(dtype: torch.dtype) -> None:
    logits, targets = inputs(6, 40, dtype)
    operators = torch.ops.megatron_lite
    arguments = (logits.requires_grad_(), targets, 0.1, 1e-3)
    torch.library.opcheck(operators.cross_entropy_cpu.default, arguments)
    losses, maxima, sums = (t.detach() for t in operators.cross_entropy_cpu(*arguments))
    backward = (torch.ones_like(losses), logits.detach(), targets, maxima, sums, 0.1, 1e-3)
    torch.library.opcheck(operators.cross_entropy_cpu_backward.default, backward)


@needs_native
def test_a_second_derivative_is_refused() -> None:
    logits, targets = inputs(2, 8, torch.float32)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(logits, targets, reduction="sum"), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no gradient"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiles_without_a_graph_break(dtype: torch.dtype) -> None:
    logits, targets = inputs(6, 40, dtype)
    op = pair(targets, 0.1, 1e-3)[0]
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_same_bits(run_with_gradients(compiled, [logits]), run_with_gradients(op, [logits]))


BAD: dict[str, tuple[type[Exception], str, Callable[[], Tensor]]] = {
    "integer logits": (ValueError, "logits is", lambda: cross_entropy(torch.ones(2, 3).int(), torch.ones(2).long())),
    "no vocabulary": (ValueError, "logits is", lambda: cross_entropy(torch.ones(2, 0), torch.ones(2).long())),
    "too few targets": (ValueError, "targets is", lambda: cross_entropy(torch.ones(2, 3), torch.ones(1).long())),
    "float targets": (ValueError, "int64", lambda: cross_entropy(torch.ones(2, 3), torch.ones(2))),
    "target beyond": (IndexError, "token id 3", lambda: cross_entropy(torch.ones(2, 3), torch.tensor([0, 3]))),
    "negative target": (IndexError, "token id -1", lambda: cross_entropy(torch.ones(2, 3), torch.tensor([0, -1]))),
    "label smoothing": (
        ValueError,
        "label_smoothing is 1.5",
        lambda: cross_entropy(torch.ones(2, 3), torch.tensor([0, 1]), label_smoothing=1.5),
    ),
    "z-loss": (ValueError, "z_loss is -1", lambda: cross_entropy(torch.ones(1, 3), torch.tensor([0]), z_loss=-1)),
    "backend": (
        ValueError,
        "kernels.cross_entropy=triton",
        lambda: cross_entropy(torch.ones(1, 3), torch.tensor([0]), backend="triton"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    kind, message, call = BAD[case]
    with pytest.raises(kind, match=message):
        call()


@needs_native
@pytest.mark.parametrize("wrong", ["size", "strides", "targets", "dtype", "gradient"])
def test_a_raw_operator_checks_before_it_reads(wrong: str) -> None:
    logits, targets, rows = torch.ones(2, 8), torch.tensor([0, 1]), torch.ones(2)
    if wrong == "strides":
        logits = torch.ones(8, 2).t()
    if wrong == "targets":
        targets = targets[:1]
    if wrong == "dtype":
        logits = logits.double()
    statistics, gradient = (
        getattr(torch.ops.megatron_lite_cpu, f"cross_entropy_{name}") for name in ("statistics", "gradient")
    )
    size = 9 if wrong == "size" else 8
    out = torch.ones(2, 4) if wrong == "gradient" else torch.empty_like(logits)
    with pytest.raises(RuntimeError, match=r"cross_entropy|the kernel takes"):
        gradient(logits, targets, rows, rows, rows, IGNORED_TARGET, 0, size, 8, 0.0, 0.0, out)
    if wrong != "gradient":
        with pytest.raises(RuntimeError, match=r"cross_entropy|the kernel takes"):
            statistics(logits, targets, 0, size, IGNORED_TARGET)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("wrong", ["output", "gradient"])
def test_the_rule_catches_an_error_of_some_units(dtype: torch.dtype, wrong: str) -> None:
    """Negative control: losses, or a gradient, that are off by a few roundings fail the comparison."""
    logits, targets = inputs(3, 512, dtype)
    op, plain = pair(targets)

    class Perturbed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(x)
            return op(x) * (1 + 32 * 2.0**-23 if wrong == "output" else 1)

        @staticmethod
        def backward(ctx, d_losses):  # type: ignore[no-untyped-def]
            leaf = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(op(leaf), leaf, d_losses)
            return gradient * (1 + 32 * torch.finfo(dtype).eps if wrong == "gradient" else 1)

    with pytest.raises(AssertionError, match="output 0" if wrong == "output" else "gradient of input"):
        check_against_plain(Perturbed.apply, plain, [logits])
