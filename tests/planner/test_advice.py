"""What is advised where a run does not fit: the cheapest moves first, and only those that are of use."""

from __future__ import annotations

import pytest

from megatron_lite.config import load_config
from megatron_lite.planner.advice import advise
from megatron_lite.planner.memory import Plan

# Large beside its activations, so that what is held of the parameters and gradients decides.
KEYS = [
    "model.family=llama", "model.vocab_size=1024", "model.hidden_size=1024", "model.num_layers=8", "model.num_heads=8",
    "model.max_seq_len=64", "train.seq_len=16", "train.micro_batch_size=1", "train.num_steps=1", "run.name=x",
]  # fmt: skip


def needed(*keys: str, batch: int = 16) -> tuple[Plan, int]:
    """Four dp ranks on a GPU, with batch / 4 microbatches each; bytes on the device."""
    given = [*KEYS, f"train.global_batch_size={batch}", *keys]
    plan = Plan.of(load_config(None, given, world_size=4), "cuda")
    return plan, max(stage.total.device for stage in plan.stages())


@pytest.mark.parametrize(
    ("keys", "move"),
    [
        (("parallel.zero_stage=3", "parallel.gather_policy=keep"), "parallel.gather_policy=regather"),
        (("parallel.zero_stage=2",), "parallel.reduce_policy=microbatch"),
        (("parallel.zero_stage=3", "parallel.gather_policy=regather"), "parallel.reduce_policy=microbatch"),
    ],
)
def test_a_policy_comes_before_offload(keys: tuple[str, ...], move: str) -> None:
    """Where the policy alone is enough; it is given the bytes that it then takes."""
    plan, before = needed(*keys)
    with_move = [key for key in keys if key.partition("=")[0] != move.partition("=")[0]]
    _, after = needed(*with_move, move)
    assert after < before, "the control: the move makes it less"
    advice = advise(plan, after)
    assert (advice.fits, advice.overrides, advice.num_bytes) == (True, (move,), after)
    assert advise(plan, before).overrides == (), "nothing where it fits"
    assert move not in advise(plan, after - 1).overrides or len(advise(plan, after - 1).overrides) > 1


@pytest.mark.parametrize(
    ("keys", "batch", "key"),
    [
        (("parallel.zero_stage=2",), 4, "parallel.reduce_policy"),  # one microbatch
        (("parallel.zero_stage=2", "parallel.reduce_policy=microbatch"), 16, "parallel.reduce_policy"),
        (("parallel.zero_stage=3",), 16, "parallel.gather_policy"),  # auto keeps only where there is room
    ],
)
def test_a_policy_without_effect_is_not_advised(keys: tuple[str, ...], batch: int, key: str) -> None:
    plan, _ = needed(*keys, batch=batch)
    advice = advise(plan, 1)
    assert not advice.fits and not [one for one in advice.overrides if one.startswith(key)]


def test_a_stage_that_needs_the_policy_is_advised_with_it() -> None:
    plan, _ = needed("parallel.zero_stage=1")
    _, sliced = needed("parallel.zero_stage=2", "parallel.reduce_policy=microbatch")
    advice = advise(plan, sliced)
    assert advice.fits and advice.overrides == ("parallel.zero_stage=2", "parallel.reduce_policy=microbatch")
