"""The output projection and softmax cross-entropy in one operation, in chunks of tokens.

The logits of a whole batch never exist: a chunk's logits are made, reduced to a loss and, at once, to the gradients of
the activations and of the weight, which are all that backward needs. That is the arithmetic of the plain computation
(three matrix products a chunk) at a fraction of its memory.

The vocabulary may be sharded: the caller then passes how to reduce over the shards, and this file stays free of
communication (Shoeybi et al. 2019, Megatron-LM, section 3). Per chunk one maximum and one sum of two rows are reduced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.ops import dispatch

IGNORED_TARGET = -100
# Logits of one chunk, in the statistics' dtype. Larger chunks only cost memory: the products are at peak by then.
CHUNK_BYTES = 32 << 20


def _unsharded(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True)
class VocabularyShard:
    """Rows ``start .. start + size`` of ``vocab_size``, and how to reduce a tensor in place over all shards.

    Rows of the local weight beyond ``size`` only pad.
    """

    start: int
    size: int
    vocab_size: int
    reduce_max: Callable[[Tensor], Tensor] = _unsharded
    reduce_sum: Callable[[Tensor], Tensor] = _unsharded


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    shard: VocabularyShard | None = None,
    saves_gradients: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Sum over tokens of ``logsumexp(x W^T) - (x W^T)[target]``.

    Args:
        x: activations ``[T, H]``, any float dtype.
        weight: ``[V, H]``, or this rank's rows of it.
        targets: int64 ``[T]``, global token ids; -100 is ignored.
        shard: which rows of the vocabulary ``weight`` holds; None for all of it.
        saves_gradients: compute the gradients along with the loss. If False backward recomputes the logits instead,
            for schedules that run many forwards before the first backward; the bits are the same.

    Returns:
        A float64 scalar, so that sums over microbatches and ranks do not round; with ``saves_gradients`` it can be
        differentiated once. Statistics are float32, or float64
        for float64 input. Backward: with a sharded vocabulary the gradient of ``x`` is a partial sum over the shards.
    """
    if shard is None:
        shard = VocabularyShard(0, weight.shape[0], weight.shape[0])
    check_ids(targets.masked_fill(targets == IGNORED_TARGET, 0), shard.vocab_size)
    dispatch.select("cross_entropy", backend, x.dtype, x.device.type)
    wants_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(x, weight, targets, shard, wants_grad, saves_gradients)


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Raises IndexError for a token id outside of ``0 .. vocab_size - 1``; on CUDA the device asserts, later."""
    if ids.numel() == 0 or torch.compiler.is_compiling():
        return
    if ids.is_cuda:
        torch._assert_async(((ids >= 0) & (ids < vocab_size)).all())
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise IndexError(f"token id {low if low < 0 else high} is outside of the vocabulary, 0 .. {vocab_size - 1}")


def linear_cross_entropy_reference(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The specification: all logits at once, differentiable by autograd."""
    logits = F.linear(x, weight)
    statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
    return F.cross_entropy(logits.to(statistics), targets, ignore_index=IGNORED_TARGET, reduction="none").double().sum()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        shard: VocabularyShard,
        wants_grad: bool,
        saves_gradients: bool,
    ) -> Tensor:
        statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
        losses = torch.empty(x.shape[0], dtype=statistics, device=x.device)
        maxima, sums = torch.empty_like(losses), torch.empty_like(losses)
        gradients = _Gradients(x, weight) if wants_grad and saves_gradients else None
        for rows in _chunks(x.shape[0], weight.shape[0] * losses.element_size()):
            logits = _logits(x[rows], weight, shard, statistics)
            local, hit = _local_targets(targets[rows], shard)
            highest = shard.reduce_max(logits.amax(dim=-1))
            picked = logits.gather(1, local[:, None])[:, 0].sub_(highest).masked_fill_(~hit, 0)
            exponentials = logits.sub_(highest[:, None]).exp_()
            total, picked = shard.reduce_sum(torch.stack((exponentials.sum(dim=-1), picked)))
            maxima[rows], sums[rows] = highest, total
            losses[rows] = (total.log() - picked).masked_fill_(targets[rows] == IGNORED_TARGET, 0)
            if gradients is not None:
                probabilities = exponentials.div_(total[:, None])
                gradients.add(rows, x, weight, probabilities, targets[rows], local, hit)
        ctx.shard, ctx.gradients = shard, gradients
        if wants_grad and not saves_gradients:
            ctx.save_for_backward(x, weight, targets, maxima, sums)
        return losses.to(torch.float64).sum()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            if not ctx.saved_tensors:
                raise RuntimeError("linear_cross_entropy gave its gradients away in the first backward; use it again")
            gradients = _recompute(ctx.shard, *ctx.saved_tensors)
        return gradients.x.mul_(grad_output), gradients.weight.mul_(grad_output), None, None, None, None


class _Gradients:
    """Gradients of the sum of losses, gathered chunk by chunk; the weight's in the statistics' dtype."""

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        self.x = torch.empty_like(x)
        accumulation = torch.float64 if x.dtype == torch.float64 else torch.float32
        make = torch.empty if x.shape[0] else torch.zeros
        self.weight = make(weight.shape, dtype=accumulation, device=weight.device)
        self._is_empty = True

    def add(
        self, rows: slice, x: Tensor, weight: Tensor, probabilities: Tensor, targets: Tensor, local: Tensor, hit: Tensor
    ) -> None:
        """Turns a chunk's probabilities into its gradients; overwrites ``probabilities``."""
        probabilities.scatter_add_(1, local[:, None], -hit.to(probabilities.dtype)[:, None])
        probabilities.masked_fill_((targets == IGNORED_TARGET)[:, None], 0)
        grad_logits = probabilities.to(x.dtype)
        torch.mm(grad_logits, weight, out=self.x[rows])
        if x.dtype == self.weight.dtype:
            torch.addmm(self.weight, grad_logits.t(), x[rows], beta=0 if self._is_empty else 1, out=self.weight)
        elif self._is_empty:
            self.weight.copy_(grad_logits.t() @ x[rows])
        else:
            self.weight.add_(grad_logits.t() @ x[rows])
        self._is_empty = False


def _recompute(
    shard: VocabularyShard, x: Tensor, weight: Tensor, targets: Tensor, maxima: Tensor, sums: Tensor
) -> _Gradients:
    gradients = _Gradients(x, weight)
    for rows in _chunks(x.shape[0], weight.shape[0] * maxima.element_size()):
        exponentials = _logits(x[rows], weight, shard, maxima.dtype).sub_(maxima[rows][:, None]).exp_()
        probabilities = exponentials.div_(sums[rows][:, None])
        gradients.add(rows, x, weight, probabilities, targets[rows], *_local_targets(targets[rows], shard))
    return gradients


def _chunks(num_tokens: int, bytes_per_token: int) -> list[slice]:
    step = max(1, CHUNK_BYTES // bytes_per_token)
    return [slice(start, min(start + step, num_tokens)) for start in range(0, num_tokens, step)]


def _logits(x: Tensor, weight: Tensor, shard: VocabularyShard, dtype: torch.dtype) -> Tensor:
    """A chunk's logits in ``dtype``, in memory of their own; rows of the weight that only pad get -infinity."""
    logits = F.linear(x, weight).to(dtype)
    if shard.size < weight.shape[0]:
        logits[:, shard.size :] = float("-inf")
    return logits


def _local_targets(targets: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """Row of each target in this shard (0 where it lies elsewhere), and whether it lies here."""
    local = targets - shard.start
    hit = (local >= 0) & (local < shard.size)
    return local.masked_fill(~hit, 0), hit
