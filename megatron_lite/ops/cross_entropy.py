"""Softmax cross-entropy over a vocabulary, with label smoothing and z-loss.

Of a row of logits x, whose target is y, in a vocabulary of V:

    loss      lse - (1 - e) x_y - e mean(x) + z lse^2        lse = log sum exp(x)
    gradient  p (1 + 2 z lse) - (1 - e) [y] - e / V          p = exp(x - lse)

e is the label smoothing (arXiv:1512.00567, section 7; as torch.nn.functional.cross_entropy has it) and z the
coefficient of the z-loss (PaLM, arXiv:2204.02311, section 5). Loss and gradient of an ignored target are zero.

Forward and backward are one pass over the logits each (cross_entropy_shard.py, which has them for a shard too).
Statistics are float32 (float64 for float64 logits); logits and gradients stay in their dtype. A row's results depend on
nothing but the row.

Each kernel is an operator `megatron_lite::cross_entropy_<backend>` with fake and autograd registrations, so
torch.compile takes it as it is.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.ops import checks, dispatch, native
from megatron_lite.ops.cross_entropy_shard import (
    IGNORED_TARGET,
    RowStatistics,
    VocabularyShard,
    local_statistics,
    reduced_losses,
    write_gradient,
)
from megatron_lite.ops.precision import wide

_Triple = tuple[Tensor, Tensor, Tensor]


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Literal["none", "sum"] = "none",
    backend: str = "auto",
) -> Tensor:
    """Losses of logits[..., V] at targets[...]; -100 is ignored: its loss and gradient are zero.

    Args:
        logits: fp32, bf16, fp16 or fp64, with any strides.
        targets: int64.
        label_smoothing: from 0 to 1; the share of each target that is spread evenly over the vocabulary.
        z_loss: coefficient, 0 or more, of lse^2, which is part of the loss.
        reduction: ``none`` for the losses, fp32 (fp64 for fp64 logits); ``sum`` for their sum in fp64, a scalar.
        backend: auto, reference, cpu, triton or cuda.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a backend that cannot run.
        IndexError: a target outside of the vocabulary (on CUDA the device asserts, later).
    """
    check_loss("cross_entropy", label_smoothing, z_loss)
    checks.require(reduction in ("none", "sum"), "cross_entropy", "reduction", reduction, "none or sum")
    checks.require_float("cross_entropy", "logits", logits)
    checks.require(logits.dim() >= 1 and logits.shape[-1] > 0, "cross_entropy", "logits", logits, "[..., V], V > 0")
    checks.require_shape("cross_entropy", "targets", targets, tuple(logits.shape[:-1]), "the shape of logits but V")
    check_targets("cross_entropy", logits, targets, logits.shape[-1])
    choice = dispatch.select("cross_entropy", backend, logits.dtype, logits.device.type).backend
    if choice == "reference":
        losses = cross_entropy_reference(logits, targets, label_smoothing, z_loss)
    else:
        operator = getattr(torch.ops.megatron_lite, f"cross_entropy_{choice}")
        flat = logits.reshape(-1, logits.shape[-1]).contiguous()
        losses = operator(flat, targets.reshape(-1).contiguous(), label_smoothing, z_loss)[0].view(targets.shape)
    return losses if reduction == "none" else losses.double().sum()


def cross_entropy_reference(
    logits: Tensor, targets: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Tensor:
    """The specification of `cross_entropy`, in plain torch: a loss for each target."""
    x, flat = wide(logits.reshape(-1, logits.shape[-1])), targets.reshape(-1)
    losses = F.cross_entropy(x, flat, ignore_index=IGNORED_TARGET, label_smoothing=label_smoothing, reduction="none")
    if z_loss:
        squares = x.logsumexp(dim=-1).square()
        losses = losses + z_loss * squares.masked_fill(flat == IGNORED_TARGET, 0)
    return losses.view(targets.shape)


def check_loss(op: str, label_smoothing: float, z_loss: float) -> None:
    """Raises ValueError for constants of the loss that make no sense."""
    checks.require(0 <= label_smoothing <= 1, op, "label_smoothing", label_smoothing, "a number from 0 to 1")
    checks.require(z_loss >= 0, op, "z_loss", z_loss, "a number of 0 or more")


def check_targets(op: str, logits: Tensor, targets: Tensor, vocab_size: int) -> None:
    """Raises ValueError for targets of another dtype or device, IndexError for one outside of the vocabulary."""
    takes = f"int64 on the device of the logits, {logits.device}"
    checks.require(targets.dtype == torch.int64 and targets.device == logits.device, op, "targets", targets, takes)
    check_ids(targets.masked_fill(targets == IGNORED_TARGET, 0), vocab_size)


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Raises IndexError for a token id outside of ``0 .. vocab_size - 1``; on CUDA the device asserts, later."""
    if ids.numel() == 0 or native.is_traced():
        return
    if ids.is_cuda:
        torch._assert_async(((ids >= 0) & (ids < vocab_size)).all())
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise IndexError(f"token id {low if low < 0 else high} is outside of the vocabulary, 0 .. {vocab_size - 1}")


def _register(backend: str, dispatch_key: str) -> None:
    """Defines the operators cross_entropy_<backend> and cross_entropy_<backend>_backward."""
    name = f"cross_entropy_{backend}"

    def forward(logits: Tensor, targets: Tensor, label_smoothing: float, z_loss: float) -> _Triple:
        shard = VocabularyShard(0, logits.shape[1], logits.shape[1])
        local = local_statistics(logits, targets, shard, backend)
        losses, statistics = reduced_losses(local, targets, shard, label_smoothing, z_loss)
        return losses, statistics.maxima, statistics.sums

    def fake_forward(logits: Tensor, targets: Tensor, label_smoothing: float, z_loss: float) -> _Triple:
        losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
        return losses, torch.empty_like(losses), torch.empty_like(losses)

    def backward(
        d_losses: Tensor,
        logits: Tensor,
        targets: Tensor,
        maxima: Tensor,
        sums: Tensor,
        label_smoothing: float,
        z_loss: float,
    ) -> Tensor:
        shard = VocabularyShard(0, logits.shape[1], logits.shape[1])
        gradient, statistics = torch.empty_like(logits), RowStatistics(maxima, sums)
        upstream = d_losses.contiguous()
        write_gradient(logits, targets, statistics, upstream, shard, label_smoothing, z_loss, gradient, backend)
        return gradient

    def fake_backward(d_losses: Tensor, logits: Tensor, *_: Any) -> Tensor:
        return torch.empty_like(logits)

    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float, float], output: _Triple) -> None:
        ctx.save_for_backward(*inputs[:2], *output[1:])
        ctx.constants = inputs[2:]
        ctx.mark_non_differentiable(*output[1:])

    def gradient(ctx: Any, d_losses: Tensor, *_: Any) -> tuple[Tensor, None, None, None]:
        operator = getattr(torch.ops.megatron_lite, f"{name}_backward")
        return operator(d_losses, *ctx.saved_tensors, *ctx.constants), None, None, None

    constants = "float label_smoothing, float z_loss"
    schema = f"{name}(Tensor logits, Tensor targets, {constants}) -> (Tensor losses, Tensor maxima, Tensor sums)"
    native.define_operator(schema, dispatch_key, forward, fake_forward, gradient, setup_context)
    saved = "Tensor d_losses, Tensor logits, Tensor targets, Tensor maxima, Tensor sums"
    native.define_operator(f"{name}_backward({saved}, {constants}) -> Tensor", dispatch_key, backward, fake_backward)


_register("cpu", "CPU")
_register("cuda", "CUDA")
_register("triton", "CUDA")
