"""Where a loss or gradient that is no number comes from, and the errors that end a run over one.

A step whose loss or gradient is no number has changed no weight, and nothing in it is random: run again, it does the
same. So the search costs nothing as long as nothing is wrong.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.config.schema import RunConfig
from megatron_lite.distributed import collectives
from megatron_lite.distributed.mesh import Mesh
from megatron_lite.pipeline.runner import MicrobatchLike
from megatron_lite.train.build import Training
from megatron_lite.train.folder import run_folder
from megatron_lite.train.step import StepResult, gradient_norm, run_schedule
from megatron_lite.utils import run_files

_LOSS = -1  # its depth: behind the last layer


class DivergedError(ValueError):
    """The loss or the gradient is no longer a number. Every rank raises it, with the same message."""

    is_agreed = True


class LossScaleError(ValueError):
    """fp16: so many steps in a row overflowed that no loss scale will do. Raised as DivergedError is."""

    is_agreed = True


@dataclass(frozen=True, order=True)
class _Finding:
    """Something that is no number, in the order in which it is made: depth counts from the loss backwards."""

    microbatch: int
    depth: int
    rank: int
    message: str


def has_diverged(training: Training, result: StepResult) -> bool:
    """Whether the step ends the run: its loss or gradient is no number, with fp16 for the last time. The same on every
    rank."""
    scale = training.loss_scaler
    return not result.is_finite and (scale is None or scale.is_hopeless)


def refuse_divergence(
    training: Training, microbatches: Sequence[MicrobatchLike], step: int, result: StepResult
) -> None:
    """Raises DivergedError if the step's loss or gradient is no number, with fp16 LossScaleError if that has happened
    too often. Every rank calls it, and raises the same error, which says where the first such number is made."""
    config, scale = training.config, training.loss_scaler
    if not has_diverged(training, result):
        return
    name, value = ("loss", result.loss) if not math.isfinite(result.loss) else ("gradient norm", result.grad_norm)
    # Asynchronous updates have changed the weights after each microbatch; there is nothing to run again.
    source = "" if config.parallel.weight_stashing else f": {find_source(training, microbatches)}"
    if scale is not None:
        raise LossScaleError(
            f"step {step}: the {name} is {value}, and {scale.skips_in_a_row} steps in a row were skipped, the last at "
            f"a loss scale of {result.loss_scale:g}{source}; {remedy(config, result)}"
        )
    raise DivergedError(
        f"step {step}: the {name} is {value}, at learning rate {result.lr:.3g}{source}; lower optim.lr "
        f"({config.optim.lr:g}), lengthen optim.warmup_steps ({config.optim.warmup_steps}), or look at the "
        f"grad_norm of the steps before in {run_folder(config) / run_files.METRICS}"
    )


def remedy(config: RunConfig, result: StepResult) -> str:
    """What to do about a loss scale that is hopeless."""
    keys = config.loss_scale
    # The loss is computed before it is scaled: where it is no number itself no scale mends it.
    if math.isfinite(result.loss) and result.loss_scale > keys.minimum:
        hysteresis = f"a smaller loss_scale.hysteresis ({keys.hysteresis}), " if keys.hysteresis > 1 else ""
        return (
            f"the scale could still fall: begin with a smaller loss_scale.initial ({keys.initial:g}), {hysteresis}"
            f"or allow more skips by loss_scale.max_skips ({keys.max_skips})"
        )
    return (
        f"train with train.precision=bf16, lower optim.lr ({config.optim.lr:g}), or allow smaller scales by "
        f"loss_scale.minimum ({keys.minimum:g}) and more skips by loss_scale.max_skips ({keys.max_skips})"
    )


def find_source(training: Training, microbatches: Sequence[MicrobatchLike]) -> str:
    """Runs the microbatches again, and says which rank, parameter and microbatch has the first number that is none.

    First is the earliest microbatch, in it the loss, then the parameters from the last layer backwards, then the lowest
    rank. Every rank calls it, and gets the same answer. Weights and moments stay as they are; gradients do not.
    """
    rank, names = training.mesh.rank, [spec.name for spec in training.table]
    depths = {name: depth for depth, name in enumerate(reversed(names))}
    found: list[_Finding] = []

    def look(name: str, microbatch: int, values: Tensor) -> None:
        # A sum over microbatches stays what it has become: only the first of them says where that was.
        if any(one.depth == depths[name] for one in found):
            return
        if what := _what_is_wrong(values):
            found.append(_Finding(microbatch, depths[name], rank, f"the gradient of {name} has {what}"))

    with _probed(training, look):
        loss_sums, _ = run_schedule(training, microbatches)
    for microbatch, loss_sum in enumerate(loss_sums):
        if not math.isfinite(loss_sum):
            found.append(_Finding(microbatch, _LOSS, rank, f"the loss is {float(loss_sum)}"))
    places = collectives.gather_objects(_place(training.mesh), training.mesh.world)
    firsts = collectives.gather_objects(min(found, default=None), training.mesh.world)
    first = min((one for one in firsts if one is not None), default=None)
    if first is not None:
        return (
            f"on rank {first.rank} ({places[first.rank]}) {first.message} in microbatch {first.microbatch} "
            f"of {len(microbatches)}, counted from 0"
        )
    if math.isfinite(gradient_norm(training)):
        return "run again, the same microbatches give numbers: look for a fault of the machine"
    return "the gradients of all microbatches are numbers, and their sum over microbatches or ranks is beyond its dtype"


@contextlib.contextmanager
def _probed(training: Training, look: Callable[[str, int, Tensor], None]) -> Iterator[None]:
    """Within it every gradient of a parameter goes to ``look``, with the parameter's name and the microbatch.

    Both before it is added to what is there, since what adds it may take it away, and after, since a product may
    have added it already (`megatron_lite.ops.linear`).
    """
    runner, handles = training.runner, []

    def probe(name: str, values: Tensor | None) -> None:
        if values is not None and runner.current is not None:
            look(name, runner.current.microbatch, values)

    for name, parameter in training.named_parameters():
        handles += [
            parameter.register_hook(lambda gradient, name=name: probe(name, gradient)),
            parameter.register_post_accumulate_grad_hook(lambda parameter, name=name: probe(name, parameter.grad)),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _what_is_wrong(values: Tensor) -> str:
    """'3 NaN', '1 infinity', or '' where all of them are numbers."""
    if bool(torch.isfinite(values).all()):
        return ""
    nans, infinities = int(values.isnan().sum()), int(values.isinf().sum())
    counts = (f"{nans} NaN" if nans else "", f"{infinities} infinite" if infinities else "")
    return f"{' and '.join(filter(None, counts))} of {values.numel()} elements"


def _place(mesh: Mesh) -> str:
    """'dp 1, pp 0, tp 0': the axes on which there are several ranks."""
    axes = (mesh.dp, mesh.pp, mesh.cp, mesh.tp)
    return ", ".join(f"{axis.name} {axis.index}" for axis in axes if axis.size > 1) or "the only one"
