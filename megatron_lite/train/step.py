"""One optimizer step, and one evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_lite.distributed import collectives
from megatron_lite.distributed.mesh import Mesh
from megatron_lite.ops.cross_entropy_shard import IGNORED_TARGET
from megatron_lite.optim.grad_norm import clip_factor, sum_of_squares
from megatron_lite.optim.lr_schedule import learning_rate
from megatron_lite.pipeline.runner import MicrobatchLike
from megatron_lite.train.asynchronous import AsynchronousUpdates
from megatron_lite.train.build import Training
from megatron_lite.train.update import update
from megatron_lite.utils import exact


@dataclass(frozen=True)
class StepResult:
    """loss: mean over the target tokens of the global batch, in nats. grad_norm: before clipping. lr: of this step.
    loss_scale: the factor on the loss, which neither loss nor norm shows."""

    loss: float
    grad_norm: float
    lr: float
    num_target_tokens: int
    loss_scale: float = 1.0

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient are numbers; a step of which either is none changes no weight."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def train_step(training: Training, microbatches: Sequence[MicrobatchLike]) -> StepResult:
    """Takes one step over this rank's microbatches of a global batch."""
    if training.config.parallel.weight_stashing:
        return _asynchronous_step(training, microbatches)
    scale = loss_scale(training)
    loss, num_target_tokens = compute_gradients(training, microbatches)
    norm, lr = apply_gradients(training, loss)
    return StepResult(loss, norm, lr, num_target_tokens, scale)


def compute_gradients(training: Training, microbatches: Sequence[MicrobatchLike]) -> tuple[float, int]:
    """Runs the schedule; each rank's region of the engine then holds the gradient of the whole batch's loss.

    The gradient is that of the scaled loss. Returns the loss, which is not scaled, and the number of target tokens that
    it is the mean over.
    """
    loss_sums, num_targets = run_schedule(training, microbatches)
    return loss_weight(num_targets) * sum_losses(training.mesh, loss_sums), num_targets


def run_schedule(training: Training, microbatches: Sequence[MicrobatchLike]) -> tuple[list[torch.Tensor], int]:
    """Forwards, backwards and reductions of a step. Returns the microbatches' loss sums, on ranks of the last chunk
    alone, and the number of target tokens of the global batch."""
    training.engine.zero_gradients()
    num_targets = count_targets(training, microbatches)
    weight = loss_weight(num_targets) * loss_scale(training)
    weight_tensor = torch.tensor(weight, dtype=torch.float64, device=training.mesh.device)
    return training.runner.run(training.schedule, microbatches, weight_tensor), num_targets


def apply_gradients(training: Training, loss: float = 0.0) -> tuple[float, float]:
    """Updates the parameters by the clipped gradients; returns the norm before clipping and the learning rate.

    The gradients stay as they are: the optimizer multiplies by the factor as it reads them.

    Where the norm or the loss is no number, no weight, no moment and no count of updates changes. All ranks have the
    same bits of both, so they decide alike. With fp16 this is an overflow, after which the loss scale is another one.
    """
    optim = training.config.optim
    norm = gradient_norm(training)
    training.num_steps += 1
    lr = learning_rate(optim, training.num_steps, training.config.train.num_steps)
    is_finite = math.isfinite(norm) and math.isfinite(loss)
    if is_finite:
        update(training, lr, clip_factor(norm, optim.clip_grad_norm) / loss_scale(training))
    if training.loss_scaler is not None:
        training.loss_scaler.update(overflowed=not is_finite)
    return norm, lr


def loss_scale(training: Training) -> float:
    """What the loss, and with it the gradient, is multiplied by until the optimizer's step divides by it."""
    return 1.0 if training.loss_scaler is None else training.loss_scaler.value


def _asynchronous_step(training: Training, microbatches: Sequence[MicrobatchLike]) -> StepResult:
    """Updates after each microbatch, see `megatron_lite.train.asynchronous`. The norm is of the last one's gradient.

    A microbatch, of all data-parallel ranks, is what a global batch is otherwise: its loss is a mean over its targets.
    """
    training.num_steps += 1
    lr = learning_rate(training.config.optim, training.num_steps, training.config.train.num_steps)

    def reduce_and_update() -> None:
        training.engine.finish_gradients()
        update(training, lr, factor=1.0)

    training.runner.watcher = AsynchronousUpdates(training.engine, reduce_and_update)
    try:
        counts = [count_targets(training, [batch]) for batch in microbatches]
        weights = torch.tensor(
            [loss_weight(count) for count in counts], dtype=torch.float64, device=training.mesh.device
        )
        loss_sums = training.runner.run(training.schedule, microbatches, weights)
    finally:
        training.runner.watcher = None
    num_targets = sum(counts)
    return StepResult(
        loss_weight(num_targets) * sum_losses(training.mesh, loss_sums), gradient_norm(training), lr, num_targets
    )


def evaluate(training: Training, microbatches: Sequence[MicrobatchLike]) -> tuple[float, int]:
    """Mean loss in nats over the targets of all data-parallel ranks' microbatches, and how many targets there were."""
    num_targets = count_targets(training, microbatches)
    return loss_weight(num_targets) * sum_losses(training.mesh, training.runner.evaluate(microbatches)), num_targets


def loss_weight(num_targets: int) -> float:
    """What a sum of token losses enters their mean with: the one place where it is divided by their number."""
    return 1.0 / max(num_targets, 1)


def count_targets(training: Training, microbatches: Sequence[MicrobatchLike]) -> int:
    """Target tokens of the global batch: the sum over data-parallel ranks."""
    own = sum(int((batch.targets != IGNORED_TARGET).sum()) for batch in microbatches)
    return int(collectives.all_reduce(torch.tensor([own], device=training.mesh.device), training.targets_axis))


def sum_losses(mesh: Mesh, loss_sums: Sequence[torch.Tensor]) -> float:
    """The exact sum of all microbatches' loss sums over the world; tp ranks hold the same ones, the first counts."""
    limbs = torch.zeros(exact.LENGTH, dtype=torch.int64, device=mesh.device)
    if loss_sums and mesh.tp.is_first:
        limbs += exact.to_limbs(torch.stack(list(loss_sums)))
    return exact.from_limbs(collectives.all_reduce(limbs, mesh.world))


def gradient_norm(training: Training) -> float:
    """2-norm of the gradient of the whole model: every element once, over all axes, in bits that no slicing changes.

    Of the gradient of the loss itself, whatever its scale. NaN on every rank if any element anywhere is no number.
    """
    mesh = training.mesh
    limbs = torch.zeros(exact.LENGTH, dtype=torch.int64, device=mesh.device)
    for gradient, uncounted in training.engine.counted_gradients():
        own = sum_of_squares(gradient, [(interval.start, interval.stop) for interval in uncounted])
        limbs += own.to(limbs.device)  # gradients may be offloaded
    return exact.from_limbs(collectives.all_reduce(limbs, training.norm_axis)) ** 0.5 / loss_scale(training)
