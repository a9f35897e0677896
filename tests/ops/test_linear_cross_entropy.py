from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from megatron_lite.distributed import collectives
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.topology import Layout
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.ops import linear_cross_entropy as module
from megatron_lite.ops.cross_entropy_shard import IGNORED_TARGET, VocabularyShard
from megatron_lite.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from tests.ops.oracle import assert_same_bits, assert_within, run_python

TOKENS, HIDDEN, VOCABULARY = 23, 16, 61
Op = Callable[..., Tensor]


def inputs(dtype: torch.dtype, tokens: int = TOKENS, vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and targets, of which every fifth is ignored."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, HIDDEN, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[2::5] = IGNORED_TARGET
    return x.to(dtype), weight.to(dtype), targets


def run(op: Op, x: Tensor, weight: Tensor, targets: Tensor, scale: float = 1.0, **options: Any) -> list[Tensor]:
    """Loss (as ``[1]``), gradient of x, gradient of the weight."""
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    loss = op(leaves[0], leaves[1], targets, **options)
    return [loss.detach().view(1), *torch.autograd.grad(loss, leaves, torch.tensor(scale, dtype=loss.dtype))]


@pytest.fixture(params=[1, 7, 8, 23, 1000])
def tokens_per_chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks of this many tokens: single ones, such that do not divide the batch, all of it, more."""
    count: int = request.param
    monkeypatch.setattr(module, "CHUNK_BYTES", count * VOCABULARY * 8)
    chunks = module._chunks(TOKENS, VOCABULARY * 8)
    assert chunks[0] == slice(0, min(count, TOKENS)) and chunks[-1].stop == TOKENS
    return count


@pytest.mark.parametrize("saves_gradients", [True, False])
def test_float64_equals_the_reference(tokens_per_chunk: int, saves_gradients: bool) -> None:
    """1e-13: some hundred roundings."""
    actual = run(linear_cross_entropy, *inputs(torch.float64), scale=0.3, saves_gradients=saves_gradients)
    expected = run(linear_cross_entropy_reference, *inputs(torch.float64), scale=0.3)
    for name, one, other in zip(("loss", "x", "weight"), actual, expected, strict=True):
        assert one.dtype == torch.float64 and other.abs().max() > 0
        assert (one - other).abs().max() <= 1e-13 * other.abs().max(), name


def test_gradients_are_those_of_the_forward() -> None:
    """By finite differences, which know nothing of the reference. What is saved has the bits of what is recomputed."""
    x, weight, targets = inputs(torch.float64, tokens=6, vocabulary=5)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return linear_cross_entropy(a, b, targets, saves_gradients=False)

    assert torch.autograd.gradcheck(loss, (x.requires_grad_(), weight.requires_grad_()))
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(lambda a, b: _GradientOfAMean.apply(loss(a, b)), (x, weight))


class _GradientOfAMean(torch.autograd.Function):
    """Negative control: a loss that is right, with a gradient that is six times too small."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / 6


def test_saved_gradients_serve_one_backward() -> None:
    """They are scaled in place; a second backward says so, and recomputing serves as many as one likes."""
    x, weight, targets = inputs(torch.float64)
    loss = linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), targets)
    torch.autograd.grad(loss, [x, weight], retain_graph=True)
    with pytest.raises(RuntimeError, match="first backward"):
        torch.autograd.grad(loss, [x, weight])
    loss = linear_cross_entropy(x, weight, targets, saves_gradients=False)
    first, second = (torch.autograd.grad(loss, [x, weight], retain_graph=True) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("target", [VOCABULARY, -1])
def test_a_target_outside_the_vocabulary_is_refused(target: int) -> None:
    """As F.cross_entropy does. Only -100 is ignored."""
    x, weight, targets = inputs(torch.float32)
    targets[4] = target
    with pytest.raises((ValueError, IndexError)):
        linear_cross_entropy_reference(x, weight, targets)
    with pytest.raises((ValueError, IndexError)):
        linear_cross_entropy(x, weight, targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_is_at_most_twice_that_of_plain_torch(dtype: torch.dtype, tokens_per_chunk: int) -> None:
    """Plain torch: the matrix product, and the statistics in float32."""
    x, weight, targets = inputs(dtype)
    actual = run(linear_cross_entropy, x, weight, targets)
    plain = run(linear_cross_entropy_reference, x, weight, targets)
    exact = run(linear_cross_entropy_reference, x.double(), weight.double(), targets)
    assert [t.dtype for t in actual] == [torch.float64, dtype, dtype]
    loss_unit = 2.0**-23 * TOKENS  # each token's loss is rounded to float32
    assert abs(actual[0] - exact[0]) <= 2 * abs(plain[0] - exact[0]) + loss_unit
    for name, a, p, e in zip(("x", "weight"), actual[1:], plain[1:], exact[1:], strict=True):
        assert_within(name, a, p, e, factor=2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_in_bf16_would_be_noticed(dtype: torch.dtype) -> None:
    x, weight, targets = inputs(dtype)
    exact = run(linear_cross_entropy_reference, x.double(), weight.double(), targets)[0]
    plain = run(linear_cross_entropy_reference, x, weight, targets)[0]
    logits = (x @ weight.t()).to(torch.bfloat16)
    careless = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").double()
    assert abs(careless - exact) > 2 * abs(plain - exact) + 2.0**-23 * TOKENS


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_recomputing_gives_the_same_bits(dtype: torch.dtype, tokens_per_chunk: int) -> None:
    saved, recomputed = (
        run(linear_cross_entropy, *inputs(dtype), scale=0.7, saves_gradients=saves) for saves in (True, False)
    )
    assert_same_bits(saved, recomputed)


def test_a_chunk_is_at_least_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(linear_cross_entropy, *inputs(torch.float64))
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    assert len(module._chunks(TOKENS, 8 * VOCABULARY)) == TOKENS
    for one, other in zip(run(linear_cross_entropy, *inputs(torch.float64)), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("saves_gradients", [True, False])
def test_ignored_targets_take_no_part(saves_gradients: bool) -> None:
    """The same as without their tokens, and their own gradient is zero."""
    x, weight, targets = inputs(torch.float64)
    kept = targets != IGNORED_TARGET
    assert 0 < int(kept.sum()) < TOKENS
    loss, grad_x, grad_weight = run(linear_cross_entropy, x, weight, targets, saves_gradients=saves_gradients)
    expected = run(linear_cross_entropy, x[kept], weight, targets[kept], saves_gradients=saves_gradients)
    assert not grad_x[~kept].any() and grad_x[kept].abs().amin(dim=1).min() > 0
    for one, other in zip((loss, grad_x[kept], grad_weight), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("saves_gradients", [True, False])
def test_all_targets_ignored(saves_gradients: bool) -> None:
    x, weight, targets = inputs(torch.float32)
    results = run(
        linear_cross_entropy, x, weight, torch.full_like(targets, IGNORED_TARGET), saves_gradients=saves_gradients
    )
    assert all(not result.any() for result in results)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_large_logits_do_not_overflow(dtype: torch.dtype) -> None:
    x, weight, targets = inputs(dtype)
    results = run(linear_cross_entropy, 300 * x, weight, targets)
    assert all(torch.isfinite(result).all() for result in results)
    expected = run(linear_cross_entropy_reference, (300 * x).double(), weight.double(), targets)[0]
    torch.testing.assert_close(results[0], expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=0)


def test_a_token_that_is_not_a_number_makes_the_loss_so() -> None:
    x, weight, targets = inputs(torch.float32)
    x[1, 3] = float("nan")
    assert torch.isnan(linear_cross_entropy(x, weight, targets))


def test_without_gradients_the_loss_is_the_same(tokens_per_chunk: int) -> None:
    x, weight, targets = inputs(torch.float32)
    with_gradients = run(linear_cross_entropy, x, weight, targets)[0]
    with torch.no_grad():
        assert_same_bits([linear_cross_entropy(x.requires_grad_(), weight, targets).view(1)], [with_gradients])
    loss = linear_cross_entropy(x.detach(), weight, targets)
    assert not loss.requires_grad
    assert_same_bits([loss.view(1)], [with_gradients])


@pytest.mark.parametrize("which", [0, 1])
def test_one_input_alone_may_need_a_gradient(which: int) -> None:
    x, weight, targets = inputs(torch.float64)
    leaf = (x, weight)[which].requires_grad_()
    linear_cross_entropy(x, weight, targets).backward()
    assert leaf.grad is not None
    torch.testing.assert_close(
        leaf.grad, run(linear_cross_entropy_reference, x, weight, targets)[1 + which], rtol=1e-13, atol=1e-14
    )


def test_strided_activations() -> None:
    x, weight, targets = inputs(torch.float64)
    strided = x.t().contiguous().t()
    assert not strided.is_contiguous() and torch.equal(strided, x)
    for one, other in zip(
        run(linear_cross_entropy, strided, weight, targets), run(linear_cross_entropy, x, weight, targets), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("saves_gradients", [True, False])
@pytest.mark.parametrize("constants", [(0.1, 0.0), (0.0, 1e-2), (0.2, 1e-3)], ids=str)
def test_label_smoothing_and_z_loss(
    constants: tuple[float, float], saves_gradients: bool, dtype: torch.dtype, tokens_per_chunk: int
) -> None:
    x, weight, targets = inputs(dtype)
    options = {"label_smoothing": constants[0], "z_loss": constants[1]}
    actual = run(linear_cross_entropy, x, weight, targets, 0.3, saves_gradients=saves_gradients, **options)
    plain = run(linear_cross_entropy_reference, x, weight, targets, 0.3, **options)
    exact = run(linear_cross_entropy_reference, x.double(), weight.double(), targets, 0.3, **options)
    unit = 1e-13 if dtype == torch.float64 else 2.0**-23
    assert abs(actual[0] - exact[0]) <= 2 * abs(plain[0] - exact[0]) + unit * exact[0]
    for name, a, p, e in zip(("x", "weight"), actual[1:], plain[1:], exact[1:], strict=True):
        assert_within(name, a, p, e, factor=2.0)
    without = run(linear_cross_entropy, x, weight, targets, 0.3)
    assert abs(without[0] - exact[0]) > 1e-3 * exact[0], "the constants change nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_every_backend(backend: str, dtype: torch.dtype) -> None:
    x, weight, targets = inputs(dtype)
    options = {"label_smoothing": 0.1, "z_loss": 1e-3}
    actual = run(linear_cross_entropy, x, weight, targets, backend=backend, **options)
    plain = run(linear_cross_entropy_reference, x, weight, targets, **options)
    exact = run(linear_cross_entropy_reference, x.double(), weight.double(), targets, **options)
    for name, a, p, e in zip(("x", "weight"), actual[1:], plain[1:], exact[1:], strict=True):
        assert_within(name, a, p, e, factor=2.0)


BAD: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "weight of another width": ("weight is", lambda x, w, t: linear_cross_entropy(x, w[:, 1:], t)),
    "weight of another dtype": ("weight is", lambda x, w, t: linear_cross_entropy(x, w.double(), t)),
    "targets of another length": ("targets is", lambda x, w, t: linear_cross_entropy(x, w, t[1:])),
    "targets in floats": ("targets is", lambda x, w, t: linear_cross_entropy(x, w, t.float())),
    "activations of three dimensions": ("x is", lambda x, w, t: linear_cross_entropy(x[None], w, t)),
    "a shard of too many rows": (
        "shard is",
        lambda x, w, t: linear_cross_entropy(x, w, t, shard=VocabularyShard(0, VOCABULARY + 1, VOCABULARY + 1)),
    ),
    "label smoothing": ("label_smoothing is 2", lambda x, w, t: linear_cross_entropy(x, w, t, label_smoothing=2)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    message, call = BAD[case]
    with pytest.raises(ValueError, match=f"linear_cross_entropy: {message}"):
        call(*inputs(torch.float32))


PEAK_MEMORY = """
import re, sys, torch
from megatron_lite.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
op = {"ours": linear_cross_entropy, "plain": linear_cross_entropy_reference}[sys.argv[1]]
x, weight = torch.randn(1024, 64).requires_grad_(), torch.randn(32_000, 64).requires_grad_()
targets = torch.randint(32_000, (1024,))
op(x[:8], weight, targets[:8]).backward()
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
before = peak()
op(x, weight, targets).backward()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; ru_maxrss holds the peak of the parent, too")
def test_the_logits_of_the_batch_never_exist() -> None:
    """Peak memory is lower than plain torch's by more than the logits in float32, and grows by little more than a
    chunk."""
    ours, plain = (int(run_python("-c", PEAK_MEMORY, which)) for which in ("ours", "plain"))
    logits_bytes = 1024 * 32_000 * 4
    assert plain >= logits_bytes, "the measurement sees no logits"
    assert plain - ours >= logits_bytes
    assert ours <= 1.5 * module.CHUNK_BYTES + (16 << 20)


# Sharded vocabularies

ROWS = {"17 over two": (17, 2, 16), "an empty shard": (16, 2, 16), "17 over four, one empty": (17, 4, 8)}


def rows_of(vocabulary: int, rows: int, index: int) -> tuple[int, int]:
    """Start and number of the rows of a shard of ``rows``, the rest of which pads."""
    start = min(index * rows, vocabulary)
    return start, min(start + rows, vocabulary) - start


def sharded_job(
    vocabulary: int,
    rows: int,
    dtype: torch.dtype,
    saves_gradients: bool,
    counts_padding: bool,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> list[Tensor]:
    """Loss, this rank's part of the gradient of x, and the gradient of its rows with the padding's."""
    size = torch.distributed.get_world_size()
    axis = build_mesh(Layout(tp=size), device=torch.device("cpu")).tp
    x, whole, targets = inputs(dtype, vocabulary=vocabulary)
    start, count = rows_of(vocabulary, rows, axis.index)
    weight = torch.full((rows, HIDDEN), 0.5, dtype=dtype)  # in the padding: what must not be seen
    weight[:count] = whole[start : start + count]
    shard = VocabularyShard(
        start,
        rows if counts_padding else count,
        vocabulary,
        lambda values: collectives.all_reduce(values, axis, "max"),
        lambda values: collectives.all_reduce(values, axis, "sum"),
    )
    options = {"saves_gradients": saves_gradients, "label_smoothing": label_smoothing, "z_loss": z_loss}
    return run(linear_cross_entropy, x, weight, targets, scale=0.7, shard=shard, **options)


@pytest.mark.parametrize("constants", [(0.0, 0.0), (0.1, 1e-3)], ids=str)
@pytest.mark.parametrize("case", ROWS)
def test_a_sharded_vocabulary_equals_the_whole(pool: WorkerPool, case: str, constants: tuple[float, float]) -> None:
    vocabulary, size, rows = ROWS[case]
    expected = functools.partial(linear_cross_entropy_reference, label_smoothing=constants[0], z_loss=constants[1])
    loss, grad_x, grad_weight = run(expected, *inputs(torch.float64, vocabulary=vocabulary), 0.7)
    results = pool.run(sharded_job, size, vocabulary, rows, torch.float64, True, False, *constants)
    recomputed = pool.run(sharded_job, size, vocabulary, rows, torch.float64, False, False, *constants)
    for index, (result, again) in enumerate(zip(results, recomputed, strict=True)):
        assert_same_bits(result, again)
        start, count = rows_of(vocabulary, rows, index)
        torch.testing.assert_close(result[0], loss, rtol=1e-13, atol=0)
        torch.testing.assert_close(result[2][:count], grad_weight[start : start + count], rtol=1e-12, atol=1e-14)
        assert not result[2][count:].any(), "padding rows have no gradient"
    assert [rows_of(vocabulary, rows, index)[1] for index in range(size)].count(0) == int("empty" in case)
    # The gradient of x is a partial sum over the shards.
    torch.testing.assert_close(sum(result[1] for result in results), grad_x, rtol=1e-12, atol=1e-13)


def test_padding_that_counts_is_noticed(pool: WorkerPool) -> None:
    expected = run(linear_cross_entropy_reference, *inputs(torch.float64, vocabulary=17), 0.7)[0]
    loss = pool.run(sharded_job, 2, 17, 16, torch.float64, True, True)[0][0]
    assert abs(loss / expected - 1) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sharded_loss_is_as_accurate_as_plain_torch(pool: WorkerPool, dtype: torch.dtype) -> None:
    x, weight, targets = inputs(dtype, vocabulary=17)
    plain = run(linear_cross_entropy_reference, x, weight, targets, 0.7)
    exact = run(linear_cross_entropy_reference, x.double(), weight.double(), targets, 0.7)
    results = pool.run(sharded_job, 2, 17, 16, dtype, True, False)
    assert abs(results[0][0] - exact[0]) <= 2 * abs(plain[0] - exact[0]) + 2.0**-23 * TOKENS
    grad_weight = torch.cat([results[0][2], results[1][2][:1]])
    assert_within("weight", grad_weight, plain[2], exact[2], factor=2.0)


def test_a_shard_without_reductions_is_the_whole() -> None:
    x, weight, targets = inputs(torch.float64)
    shard = VocabularyShard(0, VOCABULARY, VOCABULARY)
    assert_same_bits(
        run(linear_cross_entropy, x, weight, targets, shard=shard), run(linear_cross_entropy, x, weight, targets)
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        shard.start = 1  # type: ignore[misc]
