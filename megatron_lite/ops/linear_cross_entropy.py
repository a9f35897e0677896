"""The output projection and softmax cross-entropy in one operation, in chunks of tokens.

The logits of a whole batch never exist: a chunk's logits are made, reduced to a loss and, at once, written over by
their gradient, which becomes the gradients of the activations and of the weight: all that backward needs. That is the
arithmetic of the plain computation (three matrix products a chunk) at a fraction of its memory. The logits stay in the
dtype of the activations; what reads them widens them on the way.

The vocabulary may be sharded: the caller then passes how to reduce over the shards, and this file stays free of
communication (Shoeybi et al. 2019, Megatron-LM, section 3). Per chunk one maximum of two rows and one sum of one row
(two with label smoothing) are reduced.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_lite.ops import checks, dispatch, native
from megatron_lite.ops.cross_entropy import check_loss, check_targets, cross_entropy_reference
from megatron_lite.ops.cross_entropy_shard import (
    RowStatistics,
    VocabularyShard,
    local_statistics,
    reduced_losses,
    write_gradient,
)
from megatron_lite.ops.precision import wide, wide_dtype

CHUNK_BYTES = 32 << 20  # of logits at a time. Larger chunks only cost memory: the products are at peak by then.


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    shard: VocabularyShard | None = None,
    saves_gradients: bool = True,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Sum over tokens of the loss of ``x W^T`` at its target, as `cross_entropy` defines it.

    The result includes what ``label_smoothing`` and ``z_loss`` add to it: it is what the gradients are of. Without them
    it is the sum of ``logsumexp(x W^T) - (x W^T)[target]``, the negative log-likelihood in nats.

    Args:
        x: activations ``[T, H]``, any float dtype.
        weight: ``[V, H]`` in the dtype of x, or this rank's rows of it.
        targets: int64 ``[T]``, global token ids; -100 is ignored.
        shard: which rows of the vocabulary ``weight`` holds; None for all of it.
        saves_gradients: compute the gradients along with the loss. If False backward recomputes the logits instead,
            for schedules that run many forwards before the first backward; the bits are the same.
        label_smoothing: from 0 to 1; spreads this share of each target evenly over the whole vocabulary.
        z_loss: coefficient, 0 or more, of each token's ``logsumexp(x W^T)^2``.
        backend: which kernels of `cross_entropy` run.

    Returns:
        A float64 scalar, so that sums over microbatches and ranks do not round; with ``saves_gradients`` it can be
        differentiated once. Statistics are float32, or float64 for float64 input. Backward: with a sharded vocabulary
        the gradient of ``x`` is a partial sum over the shards.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a backend that cannot run.
        IndexError: a target outside of the vocabulary (on CUDA the device asserts, later).
    """
    if shard is None:
        shard = VocabularyShard(0, weight.shape[0], weight.shape[0])
    _check(x, weight, targets, shard, label_smoothing, z_loss)
    choice = dispatch.select("cross_entropy", backend, x.dtype, x.device.type).backend
    if native.is_traced():  # the kernels between which shards communicate are no operators of their own
        choice = "reference"
    wants_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    loss = _Loss(targets.contiguous(), shard, label_smoothing, z_loss, choice)
    return _LinearCrossEntropy.apply(x, weight, loss, wants_grad, saves_gradients)


def linear_cross_entropy_reference(
    x: Tensor, weight: Tensor, targets: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Tensor:
    """The specification: all logits at once, differentiable by autograd."""
    return cross_entropy_reference(F.linear(x, weight), targets, label_smoothing, z_loss).double().sum()


def _check(
    x: Tensor, weight: Tensor, targets: Tensor, shard: VocabularyShard, label_smoothing: float, z_loss: float
) -> None:
    op = "linear_cross_entropy"
    check_loss(op, label_smoothing, z_loss)
    checks.require_float(op, "x", x)
    checks.require(x.dim() == 2, op, "x", x, "[T, H]")
    checks.require(weight.dim() == 2 and weight.shape[1] == x.shape[1], op, "weight", weight, f"[V, H = {x.shape[1]}]")
    checks.require_alike(op, "x", x, weight=weight)
    fits = shard.start >= 0 and 0 <= shard.size <= weight.shape[0]
    checks.require(fits, op, "shard", shard, f"a start of 0 or more and a size of at most V = {weight.shape[0]}")
    checks.require_shape(op, "targets", targets, (x.shape[0],), "[T]")
    check_targets(op, x, targets, shard.vocab_size)


@dataclass(frozen=True)
class _Loss:
    """All but the logits: what a chunk's rows are judged by, and with which kernels."""

    targets: Tensor
    shard: VocabularyShard
    label_smoothing: float
    z_loss: float
    backend: str

    def of(self, rows: slice, logits: Tensor) -> tuple[Tensor, RowStatistics]:
        """The losses of these rows, over all shards, and what their gradient takes."""
        targets = self.targets[rows]
        local = local_statistics(logits, targets, self.shard, self.backend)
        return reduced_losses(local, targets, self.shard, self.label_smoothing, self.z_loss)

    def write_gradient(self, rows: slice, logits: Tensor, statistics: RowStatistics) -> None:
        """Writes the gradient of the sum of these rows' losses over their logits."""
        constants = (self.shard, self.label_smoothing, self.z_loss)
        upstream = torch.ones_like(statistics.maxima)
        write_gradient(logits, self.targets[rows], statistics, upstream, *constants, logits, self.backend)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, loss: _Loss, wants_grad: bool, saves_gradients: bool) -> Tensor:
        losses = wide(x.new_empty(x.shape[0]))
        maxima, sums = torch.empty_like(losses), torch.empty_like(losses)
        gradients = _Gradients(x, weight) if wants_grad and saves_gradients else None
        for rows, logits in _chunks_of_logits(x, weight):
            losses[rows], statistics = loss.of(rows, logits)
            maxima[rows], sums[rows] = statistics.maxima, statistics.sums
            if gradients is not None:
                loss.write_gradient(rows, logits, statistics)
                gradients.add(rows, x, weight, logits)
        ctx.loss, ctx.gradients = loss, gradients
        if wants_grad and not saves_gradients:
            ctx.save_for_backward(x, weight, maxima, sums)
        return losses.to(torch.float64).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            if not ctx.saved_tensors:
                raise RuntimeError("linear_cross_entropy gave its gradients away in the first backward; use it again")
            gradients = _recompute(ctx.loss, *ctx.saved_tensors)
        return gradients.x.mul_(grad_output), gradients.weight.mul_(grad_output), None, None, None


class _Gradients:
    """Gradients of the sum of losses, gathered chunk by chunk; the weight's in the statistics' dtype."""

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        self.x = torch.empty_like(x)
        accumulation = wide_dtype(x.dtype)
        make = torch.empty if x.shape[0] else torch.zeros
        self.weight = make(weight.shape, dtype=accumulation, device=weight.device)
        self._is_empty = True

    def add(self, rows: slice, x: Tensor, weight: Tensor, grad_logits: Tensor) -> None:
        """Turns the gradient of a chunk's logits into that chunk's part of both."""
        torch.mm(grad_logits, weight, out=self.x[rows])
        if x.dtype == self.weight.dtype:
            torch.addmm(self.weight, grad_logits.t(), x[rows], beta=0 if self._is_empty else 1, out=self.weight)
        elif self._is_empty:
            self.weight.copy_(grad_logits.t() @ x[rows])
        else:
            self.weight.add_(grad_logits.t() @ x[rows])
        self._is_empty = False


def _recompute(loss: _Loss, x: Tensor, weight: Tensor, maxima: Tensor, sums: Tensor) -> _Gradients:
    gradients = _Gradients(x, weight)
    for rows, logits in _chunks_of_logits(x, weight):
        loss.write_gradient(rows, logits, RowStatistics(maxima[rows], sums[rows]))
        gradients.add(rows, x, weight, logits)
    return gradients


def _chunks_of_logits(x: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the tokens, each with its logits, which the next chunk's are written over."""
    chunks = _chunks(x.shape[0], weight.shape[0] * x.element_size())
    if not chunks:
        return
    buffer = x.new_empty(chunks[0].stop, weight.shape[0])
    for rows in chunks:
        yield rows, torch.mm(x[rows], weight.t(), out=buffer[: rows.stop - rows.start])


def _chunks(num_tokens: int, bytes_per_token: int) -> list[slice]:
    step = max(1, CHUNK_BYTES // max(1, bytes_per_token))
    return [slice(start, min(start + step, num_tokens)) for start in range(0, num_tokens, step)]
