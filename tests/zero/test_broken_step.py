"""A step that an error breaks off in the middle of a backward leaves nothing that the next one would see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite.config import RunConfig
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.train.build import Training
from megatron_lite.train.step import apply_gradients, compute_gradients
from megatron_lite.zero.gradients import Gradients
from tests.zero.test_delays import nothing, replaced
from tests.zero.test_engine import batches, config_of, start

NUM_STEPS, BROKEN_STEP = 3, 1  # the second: orders of use are known, moments are there


class BrokenOff(Exception):
    """What nobody expects."""


def break_once(training: Training, place: str) -> Callable[[], bool]:
    """Raises on every rank, in the backward of one microbatch of one step, once; returns whether it has.

    place: the microbatch, and the name of a parameter whose gradient has come, or of a module of which the output's
    gradient comes.
    """
    microbatch, _, name = place.partition(" ")
    raised: list[bool] = []

    def fail(_: Any) -> None:
        now = training.runner.current
        if now is not None and now.microbatch == int(microbatch) and training.num_steps == BROKEN_STEP and not raised:
            raised.append(True)
            raise BrokenOff

    def fail_in_backward(module: object, inputs: object, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(fail)

    if (parameter := dict(training.named_parameters()).get(name)) is not None:
        parameter.register_post_accumulate_grad_hook(fail)
    else:
        for chunk in training.chunks.values():
            for module in (module for found, module in chunk.named_modules() if found == name):
                module.register_forward_hook(fail_in_backward)
    return lambda: bool(raised)


def run(config: RunConfig, place: str) -> list[Tensor]:
    """Of each step the norm and this rank's gradients, and the weights after the last. place: "" breaks nothing off."""
    training = start(config)
    has_raised = break_once(training, place) if place else lambda: False
    found = []
    for step in range(NUM_STEPS):
        if place and step == BROKEN_STEP:
            with pytest.raises(BrokenOff):
                compute_gradients(training, batches(training, step))
            assert has_raised() and training.num_steps == step
        compute_gradients(training, batches(training, step))
        found += [bucket.sums.clone() for bucket in training.engine.buckets.values()]
        found.append(torch.tensor(apply_gradients(training)[0], dtype=torch.float64))
    found += [bucket.master.clone() for bucket in training.engine.updated_buckets()]
    return found


def differences(config: RunConfig, place: str, forgets: bool = False) -> int:
    """How many tensors of a run with a broken step differ from one without. forgets: to clean up after it."""
    expected = run(config, "")
    spoiling = replaced(Gradients, "reset", lambda self: None) if forgets else nothing()
    with spoiling:
        found = run(config, place)
    return sum(not torch.equal(one, other) for one, other in zip(found, expected, strict=True))


# Of four microbatches. In the last one the sums of a step are under way.
PLACES = ("2 layers.1.mlp.up.weight", "3 layers.0.mlp", "3 embedding.tokens.weight")
CASES = {
    "stage 1": "parallel.zero_stage=1 parallel.reduce_policy=step",
    "stage 2, step": "parallel.zero_stage=2 parallel.reduce_policy=step",
    "stage 2, microbatch": "parallel.zero_stage=2 parallel.reduce_policy=microbatch",
    "stage 2, bf16": "parallel.zero_stage=2 parallel.reduce_policy=microbatch train.precision=bf16",
    "stage 3, step": "parallel.zero_stage=3 parallel.reduce_policy=step",
    "stage 3, microbatch": "parallel.zero_stage=3 parallel.reduce_policy=microbatch",
    "stage 3, kept, bf16": "parallel.zero_stage=3 parallel.gather_policy=keep train.precision=bf16",
    "stage 3, recompute": "parallel.zero_stage=3 parallel.recompute=full",
    # When the last microbatch comes to chunk 0, chunk 1 still owes its weight gradients.
    "split backward": "parallel.zero_stage=2 parallel.schedule=zb-v",
}


def config(case: str) -> RunConfig:
    return config_of(*CASES[case].split(), "train.global_batch_size=8", world_size=2)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", CASES)
def test_the_next_step_has_the_bits_of_a_run_without(pool: WorkerPool, case: str, place: str) -> None:
    assert pool.run(differences, 2, config(case), place) == [0, 0]


@pytest.mark.parametrize("case", ["stage 2, step", "stage 3, microbatch"])
def test_gradients_that_stay_are_seen(pool: WorkerPool, case: str) -> None:
    """Negative control."""
    assert min(pool.run(differences, 2, config(case), PLACES[0], True)) > 0
