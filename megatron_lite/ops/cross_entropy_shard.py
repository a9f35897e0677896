"""Cross-entropy over a shard of a vocabulary: the two passes over the logits, and what is reduced between them.

    local_statistics   reads logits[T, W]
    reduced_losses     reduces [T] numbers over the shards, with callbacks: of communication this file knows nothing
    write_gradient     reads logits[T, W] and writes their gradient, over them if asked to

See cross_entropy.py for the equations (and Shoeybi et al. 2019, Megatron-LM, section 3, for the shards). Statistics are
float32, or float64 for float64 logits. A row's results depend on nothing but the row. None of the three is
differentiable by autograd: `write_gradient` is the derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_lite.ops import native
from megatron_lite.ops.precision import wide

IGNORED_TARGET = -100


def _unsharded(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True)
class VocabularyShard:
    """Entries ``start .. start + size`` of ``vocab_size``, and how to reduce a tensor in place over all shards.

    Columns of the local logits beyond ``size`` only pad: they count for nothing, and their gradient is zero.
    """

    start: int
    size: int
    vocab_size: int
    reduce_max: Callable[[Tensor], Tensor] = _unsharded
    reduce_sum: Callable[[Tensor], Tensor] = _unsharded


@dataclass(frozen=True)
class RowStatistics:
    """Of each row over the whole vocabulary, ``[T]``: the maximum m, and the sum of exp(x - m)."""

    maxima: Tensor
    sums: Tensor


def local_statistics(logits: Tensor, targets: Tensor, shard: VocabularyShard, backend: str) -> Tensor:
    """Contiguous logits[T, W] to ``[4, T]``: over the shard m = max x, the sum of exp(x - m), the target's logit (-inf
    where another shard has it) and the sum of x.

    Of an ignored row they are 0, 1, 0, 0. A shard of no columns has the lowest number as its maximum, and a sum of 0.
    ``backend`` is one that `dispatch.select` chose.
    """
    return _STATISTICS[backend](logits, targets, shard.start, shard.size)


def reduced_losses(
    local: Tensor, targets: Tensor, shard: VocabularyShard, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Tensor, RowStatistics]:
    """`local_statistics` to the losses ``[T]`` and what the gradient takes, over all shards.

    One maximum of two rows and one sum of two rows (of one without label smoothing) are reduced.
    """
    own_maxima, own_sums, _, own_totals = local
    maxima, picked = shard.reduce_max(local[0::2].contiguous())
    own_sums = own_sums * (own_maxima - maxima).exp()
    parts = torch.stack((own_sums, own_totals)) if label_smoothing else own_sums[None]
    reduced = shard.reduce_sum(parts)
    sums = reduced[0]
    log_sums = sums.log()
    losses = log_sums - (1.0 - label_smoothing) * (picked - maxima)
    if label_smoothing:
        losses = losses - label_smoothing * (reduced[1] / shard.vocab_size - maxima)
    if z_loss:
        losses = losses + z_loss * (maxima + log_sums).square()
    return losses.masked_fill_(targets == IGNORED_TARGET, 0), RowStatistics(maxima, sums)


def write_gradient(
    logits: Tensor,
    targets: Tensor,
    statistics: RowStatistics,
    upstream: Tensor,
    shard: VocabularyShard,
    label_smoothing: float,
    z_loss: float,
    gradient: Tensor,
    backend: str,
) -> None:
    """Writes the gradient of logits[T, W], given that of the losses, ``upstream[T]``, to ``gradient[T, W]``.

    ``gradient`` may be ``logits``. Columns that pad get zero.
    """
    constants = (shard.start, shard.size, shard.vocab_size, label_smoothing, z_loss)
    _GRADIENTS[backend](logits, targets, statistics.maxima, statistics.sums, upstream, *constants, gradient)


def _local_targets(targets: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Column of each target in this shard (0 where it lies elsewhere), and whether it lies here."""
    local = targets - start
    hit = (local >= 0) & (local < size)
    return local.masked_fill(~hit, 0), hit


def _statistics_reference(logits: Tensor, targets: Tensor, start: int, size: int) -> Tensor:
    """The specification of `local_statistics`, in plain torch."""
    x = wide(logits[:, :size])
    if size == 0:
        maxima, sums, picked, totals = x.new_full((4, len(x)), torch.finfo(x.dtype).min).unbind()
        sums, picked, totals = sums.zero_(), picked.fill_(-torch.inf), totals.zero_()
    else:
        column, hit = _local_targets(targets, start, size)
        maxima = x.amax(dim=1)
        sums = (x - maxima[:, None]).exp_().sum(dim=1)
        picked = x.gather(1, column[:, None])[:, 0].masked_fill(~hit, -torch.inf)
        totals = x.sum(dim=1)
    local = torch.stack((maxima, sums, picked, totals))
    neutral = local.new_tensor([0.0, 1.0, 0.0, 0.0])[:, None]
    return torch.where(targets == IGNORED_TARGET, neutral, local)


def _gradient_reference(
    logits: Tensor,
    targets: Tensor,
    maxima: Tensor,
    sums: Tensor,
    upstream: Tensor,
    start: int,
    size: int,
    vocab_size: int,
    label_smoothing: float,
    z_loss: float,
    gradient: Tensor,
) -> None:
    """The specification of `write_gradient`, in plain torch."""
    factors = (1.0 + 2.0 * z_loss * (maxima + sums.log())) / sums
    slope = (wide(logits[:, :size]) - maxima[:, None]).exp_().mul_(factors[:, None])
    if label_smoothing:
        slope.sub_(label_smoothing / vocab_size)
    if size:
        column, hit = _local_targets(targets, start, size)
        slope.scatter_add_(1, column[:, None], hit.to(slope.dtype)[:, None] * (label_smoothing - 1.0))
    slope.mul_(upstream[:, None]).masked_fill_((targets == IGNORED_TARGET)[:, None], 0)
    gradient[:, :size] = slope
    gradient[:, size:] = 0


def _statistics_cpu(logits: Tensor, targets: Tensor, start: int, size: int) -> Tensor:
    kernel = torch.ops.megatron_lite_cpu.cross_entropy_statistics
    return kernel(logits, targets, start, size, IGNORED_TARGET)


def _gradient_cpu(logits: Tensor, targets: Tensor, maxima: Tensor, sums: Tensor, upstream: Tensor, *rest: Any) -> None:
    kernel = torch.ops.megatron_lite_cpu.cross_entropy_gradient
    kernel(logits, targets, maxima, sums, upstream, IGNORED_TARGET, *rest)


def _statistics_cuda(logits: Tensor, targets: Tensor, start: int, size: int) -> Tensor:
    return native.run_cuda("cross_entropy_statistics", logits, targets, start, size, IGNORED_TARGET)


def _gradient_cuda(logits: Tensor, targets: Tensor, maxima: Tensor, sums: Tensor, upstream: Tensor, *rest: Any) -> None:
    native.run_cuda("cross_entropy_gradient", logits, targets, maxima, sums, upstream, IGNORED_TARGET, *rest)


def _statistics_triton(logits: Tensor, targets: Tensor, start: int, size: int) -> Tensor:
    return native.run_triton("cross_entropy", "statistics", logits, targets, start, size, IGNORED_TARGET)


def _gradient_triton(
    logits: Tensor, targets: Tensor, maxima: Tensor, sums: Tensor, upstream: Tensor, *rest: Any
) -> None:
    native.run_triton("cross_entropy", "gradient", logits, targets, maxima, sums, upstream, IGNORED_TARGET, *rest)


_STATISTICS: Mapping[str, Callable[[Tensor, Tensor, int, int], Tensor]] = {
    "reference": _statistics_reference,
    "cpu": _statistics_cpu,
    "cuda": _statistics_cuda,
    "triton": _statistics_triton,
}
_GRADIENTS: Mapping[str, Callable[..., None]] = {
    "reference": _gradient_reference,
    "cpu": _gradient_cpu,
    "cuda": _gradient_cuda,
    "triton": _gradient_triton,
}
