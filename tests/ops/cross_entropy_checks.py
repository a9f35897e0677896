"""What the Triton and the CUDA kernels of cross-entropy are both held to, given their two functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_lite.ops.cross_entropy import cross_entropy_reference
from megatron_lite.ops.cross_entropy_shard import (
    IGNORED_TARGET,
    RowStatistics,
    VocabularyShard,
    reduced_losses,
)
from tests.ops.oracle import assert_within

# Rows and columns: less than a pack, no multiple of one, many blocks; then label smoothing and z-loss.
CASES = ((1, 5, 0.0, 0.0), (3, 59, 0.1, 0.0), (4, 1111, 0.0, 1e-2), (5, 4096, 0.1, 1e-2), (2, 9001, 0.2, 0.0))
NUM_CONTROLS = 2 * len(CASES)  # of a dtype: losses and gradient


@dataclass(frozen=True)
class Kernels:
    """`statistics(logits, targets, start, size)` and `gradient(logits, targets, maxima, sums, upstream, start, size,
    vocab_size, label_smoothing, z_loss, out)`."""

    statistics: Callable[..., Tensor]
    gradient: Callable[..., None]


def check(kernels: Kernels, dtype: torch.dtype) -> int:
    """Checks losses and gradients; returns how many of them, once made wrong, were caught."""
    caught = 0
    for rows, columns, label_smoothing, z_loss in CASES:
        torch.manual_seed(columns)
        logits = (3 * torch.randn(rows, columns)).to(dtype)
        targets = torch.randint(columns, (rows,))
        targets[rows // 2 + 1 :: 3] = IGNORED_TARGET
        caught += _check_whole(kernels, logits, targets, label_smoothing, z_loss)
    _check_shards(kernels, logits[:, :300].contiguous(), targets % 300)
    _check_edges(kernels, dtype)
    return caught


def _expected(logits: Tensor, targets: Tensor, upstream: Tensor, *constants: float) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    losses = cross_entropy_reference(leaf, targets, *constants)
    return losses.detach(), torch.autograd.grad(losses, leaf, upstream.to(losses.dtype))[0]


def _check_whole(kernels: Kernels, logits: Tensor, targets: Tensor, label_smoothing: float, z_loss: float) -> int:
    (rows, columns), constants = logits.shape, (label_smoothing, z_loss)
    upstream = torch.randn(rows)
    shard = VocabularyShard(0, columns, columns)
    losses, statistics = reduced_losses(kernels.statistics(logits, targets, 0, columns), targets, shard, *constants)
    gradient, arguments = logits.clone(), (targets, statistics.maxima, statistics.sums, upstream)
    kernels.gradient(gradient, *arguments, 0, columns, columns, *constants, gradient)
    elsewhere = torch.empty_like(logits)
    kernels.gradient(logits, *arguments, 0, columns, columns, *constants, elsewhere)
    assert torch.equal(gradient, elsewhere), "over the logits and beside them"
    plain = _expected(logits, targets, upstream, *constants)
    exact = _expected(logits.double(), targets, upstream, *constants)
    caught = 0
    for name, actual, p, e in zip(("losses", "gradient"), (losses, gradient), plain, exact, strict=True):
        factor = 2.0 if name == "losses" else 3.0
        assert_within(f"{name} {logits.dtype} {rows} x {columns}", actual, p, e, factor)
        try:
            assert_within(name, actual * (1 + 64 * torch.finfo(actual.dtype).eps), p, e, factor)
        except AssertionError:
            caught += 1
    return caught


def _check_shards(kernels: Kernels, logits: Tensor, targets: Tensor) -> None:
    """Shards of 128 columns, the last of which pads 84 of them with what must not be seen, give the bits of no shard's
    neighbour: their statistics are those of their columns, their gradients those of the whole, padding's are zero."""
    rows, vocab_size, size = *logits.shape, 128
    whole = RowStatistics(*kernels.statistics(logits, targets, 0, vocab_size)[:2])
    upstream = torch.ones(rows)
    constants = (vocab_size, 0.1, 1e-3)
    expected = torch.empty_like(logits)
    kernels.gradient(logits, targets, whole.maxima, whole.sums, upstream, 0, vocab_size, *constants, expected)
    for start in range(0, vocab_size, size):
        count = min(size, vocab_size - start)
        local = torch.full((rows, size), 60.0, dtype=logits.dtype)
        local[:, :count] = logits[:, start : start + count]
        statistics = kernels.statistics(local, targets, start, count)
        columns = local[:, :count].float()
        assert torch.equal(statistics[0], columns.amax(dim=1))
        torch.testing.assert_close(statistics[1], (columns - columns.amax(dim=1)[:, None]).exp().sum(dim=1))
        is_here = (targets >= start) & (targets < start + count)
        picked = logits.float().gather(1, targets[:, None])[:, 0].masked_fill(~is_here, -torch.inf)
        assert torch.equal(statistics[2], picked)
        torch.testing.assert_close(statistics[3], columns.sum(dim=1), rtol=1e-5, atol=1e-3)
        kernels.gradient(local, targets, whole.maxima, whole.sums, upstream, start, count, *constants, local)
        assert torch.equal(local[:, :count], expected[:, start : start + count])
        assert not local[:, count:].any(), "the gradient of padding is zero"


def _check_edges(kernels: Kernels, dtype: torch.dtype) -> None:
    """No rows, a shard of no columns, ignored rows that hold NaN, large values, -infinity."""

    def run(logits: Tensor, targets: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        size = options.get("size", logits.shape[1])
        statistics = kernels.statistics(logits, targets, 0, size)
        gradient = torch.empty_like(logits)
        upstream = torch.ones(len(logits))
        kernels.gradient(logits, targets, statistics[0], statistics[1], upstream, 0, size, 8, 0.0, 0.0, gradient)
        return statistics, gradient

    statistics, gradient = run(torch.empty(0, 8, dtype=dtype), torch.empty(0, dtype=torch.int64))
    assert statistics.shape == (4, 0) and gradient.shape == (0, 8)
    statistics, gradient = run(torch.ones(2, 8, dtype=dtype), torch.tensor([1, 7]), size=0)
    assert (statistics[0] < -1e38).all() and not statistics[1].any() and (statistics[2] == -torch.inf).all()
    assert not gradient.any()
    logits = torch.full((2, 8), float("nan"), dtype=dtype)
    logits[1] = torch.tensor([-torch.inf, 1e4, -1e4, 0, 1e4, -torch.inf, -1e4, 1]).to(dtype)
    statistics, gradient = run(logits, torch.tensor([IGNORED_TARGET, 4]))
    assert statistics[:, 0].tolist() == [0.0, 1.0, 0.0, 0.0] and not gradient[0].any()
    # What underflows may be some 1e-38 instead of zero.
    expected = torch.tensor([0, 0.5, 0, 0, -0.5, 0, 0, 0])
    assert statistics[1, 1] == 2 and (gradient[1].float() - expected).abs().max() < 1e-37
    logits[1, 3] = float("nan")
    assert run(logits, torch.tensor([IGNORED_TARGET, 4]))[0][1].isnan().tolist() == [False, True]
