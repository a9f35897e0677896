"""A run whose batch grows is proven at every size, each once, and the size that is not right is named."""

from __future__ import annotations

from itertools import pairwise

import pytest

from megatron_lite.config import RunConfig, load_config
from megatron_lite.config.batch_rampup import with_batch_size
from megatron_lite.pipeline import prove, prove_batches, schedules
from megatron_lite.pipeline.instructions import Kind, Schedule, ScheduleError
from megatron_lite.pipeline.schedules import SCHEDULES, make_schedule

KEYS = (
    "model.family=llama", "model.vocab_size=97", "model.hidden_size=32", "model.num_layers=4", "model.num_heads=4",
    "model.max_seq_len=16", "train.seq_len=16", "train.global_batch_size=16", "train.micro_batch_size=2",
    "train.num_steps=9", "parallel.pp=2", "train.batch_rampup=[4,4,100]",
)  # fmt: skip


def config() -> RunConfig:
    return load_config(None, KEYS, world_size=2)


def test_every_size_is_proven_once(monkeypatch: pytest.MonkeyPatch) -> None:
    proven: list[int] = []

    def watched(run: RunConfig) -> prove.Proof:
        proven.append(run.num_microbatches)
        return prove.prove_run(run)

    monkeypatch.setattr(prove_batches, "prove_run", watched)
    proof = prove_batches.prove_batches(config())
    assert proven == [2, 4, 6, 8] and proof.num_microbatches == 8
    proven.clear()
    prove_batches.prove_batches(with_batch_size(config(), 16))
    assert proven == [8]


@pytest.mark.parametrize("broken", [6, 8])
def test_the_size_that_is_not_right_is_named(monkeypatch: pytest.MonkeyPatch, broken: int) -> None:
    def mutilated(*sizes: object) -> Schedule:
        schedule = make_schedule(*sizes)  # type: ignore[arg-type]
        if schedule.num_microbatches != broken:
            return schedule
        lists = (schedule.lists[0], schedule.lists[1][:-1])
        return Schedule(schedule.name, schedule.placement, schedule.num_microbatches, lists)

    monkeypatch.setattr(schedules, "make_schedule", mutilated)
    with pytest.raises(ScheduleError, match="is missing") as caught:
        prove_batches.prove_batches(config())
    assert ("while train.batch_rampup gives a batch of 12" in str(caught.value)) == (broken == 6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_the_full_batch_needs_is_enough_for_smaller_ones(name: str) -> None:
    """A run is built for its full batch: a rank that splits backwards of a smaller one splits those of it too."""
    virtual_stages = 2 if name in ("interleaved", "breadth-first", "zb-v", "dualpipe-v") else 1
    for num_ranks in (1, 2, 3, 4):
        needs: list[list[bool]] = []
        for num_microbatches in range(1, 15):
            schedule = make_schedule(name, num_ranks, virtual_stages, num_microbatches)
            splits = [any(one.kind is Kind.BACKWARD_WEIGHT for one in row) for row in schedule.lists]
            needs.append(splits)
        for smaller, larger in pairwise(needs):
            assert all(one <= other for one, other in zip(smaller, larger, strict=True)), (name, num_ranks)
