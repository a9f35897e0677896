"""Numbers that are none, put into a run at a place of choice, and what every rank then does."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_lite.config import RunConfig
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.train import loop
from megatron_lite.train.build import Training, layout_of
from megatron_lite.train.loop import train

LOSS = "the loss"


@dataclass(frozen=True)
class Poison:
    """``value`` is added to one element of a parameter's gradient, or to the loss, on ``rank``, in one microbatch of
    each of ``steps`` (from 1). once: not when the microbatches run again."""

    parameter: str = "head.weight"
    rank: int = 1
    microbatch: int = 1
    steps: tuple[int, ...] = (2,)
    value: float = float("inf")
    once: bool = False


@dataclass(frozen=True)
class Story:
    """What a rank tells. steps: of each, whether it was finite and the state of the loss scale after it."""

    steps: list[tuple[bool, dict[str, float] | None]]
    num_updates: int
    weights: dict[str, Tensor]
    said: str


def put(training: Training, poison: Poison, step_now: Callable[[], int]) -> None:
    """Hooks the poison into a run that was just built."""
    if poison.rank != training.mesh.rank:
        return
    given: list[int] = []  # the steps that had it

    def due() -> bool:
        now, step = training.runner.current, step_now()
        if now is None or now.microbatch != poison.microbatch or step not in poison.steps:
            return False
        given.append(step)
        return not poison.once or given.count(step) == 1

    def spoil(gradient: Tensor) -> Tensor | None:
        if not due():
            return None
        gradient = gradient.clone()
        gradient.view(-1)[5] += poison.value
        return gradient

    def spoil_sum(parameter: Tensor) -> None:
        if parameter.grad is not None and due():
            parameter.grad.view(-1)[5] += poison.value

    if poison.parameter == LOSS:
        last = training.chunks[max(training.chunks)]
        last.register_forward_hook(lambda module, inputs, output: output + poison.value if due() else None)
        return
    parameter = dict(training.named_parameters())[poison.parameter]
    # Where gradients have the dtype of their sum, a product adds to it by itself, and no gradient passes by.
    if parameter.grad is None:
        parameter.register_hook(spoil)
    else:
        # Ahead of the engine's hook, which may begin to sum over ranks: what comes after it may miss the sum.
        later = dict(parameter._post_accumulate_grad_hooks)
        parameter._post_accumulate_grad_hooks.clear()
        parameter.register_post_accumulate_grad_hook(spoil_sum)
        parameter._post_accumulate_grad_hooks.update(later)


def job(
    config: RunConfig,
    poisons: tuple[Poison, ...] = (),
    change: Callable[[Training], None] = lambda training: None,
    stop_before: int = 0,
) -> Story:
    """A run with poison in it. change: of what was built. stop_before: a step that the run does not come to."""
    mesh = build_mesh(layout_of(config), device=torch.device("cpu"))
    build, take_step, restore = loop.build, loop.train_step, loop.restore
    kept: list[Training] = []
    step = 0  # the one under way, also when it runs again
    steps: list[tuple[bool, dict[str, float] | None]] = []

    def poisoned(*args: Any, **kwargs: Any) -> Training:
        training = build(*args, **kwargs)
        for poison in poisons:
            put(training, poison, lambda: step)
        kept.append(training)
        return training

    def restored(training: Training, manifest: Any) -> Any:
        position = restore(training, manifest)
        change(training)
        return position

    def noted(training: Training, microbatches: Any) -> Any:
        nonlocal step
        step = training.num_steps + 1
        if step == stop_before:
            raise InterruptedError("cut off")
        if step == 1:
            change(training)
        result = take_step(training, microbatches)
        steps.append((result.is_finite, training.loss_scaler and training.loss_scaler.state()))
        return result

    loop.build, loop.train_step, loop.restore = poisoned, noted, restored
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(InterruptedError):
            train(config, mesh=mesh)
    finally:
        loop.build, loop.train_step, loop.restore = build, take_step, restore
    (training,) = kept
    weights = {name: training.engine.whole_master(name) for name, _ in training.named_parameters()}
    (num_updates,) = {state.num_steps for state in training.optimizer_states.values()}
    return Story(steps, num_updates, weights, said.getvalue())
