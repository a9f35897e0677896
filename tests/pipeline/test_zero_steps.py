"""The steps of ZeRO in a schedule: where they stand, that they are proven, what is said of wrong ones, their cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.config import load_config
from megatron_lite.config.schedules import SCHEDULE_RULES
from megatron_lite.pipeline.instructions import (
    USES_PARAMETERS,
    ZERO_STEPS,
    Instruction,
    Kind,
    Schedule,
    ScheduleError,
)
from megatron_lite.pipeline.prove import prove, prove_world
from megatron_lite.pipeline.prove_programs import Semantics
from megatron_lite.pipeline.schedules import forward_only, make_schedule, schedule_of
from megatron_lite.pipeline.simulate import Costs, simulate
from megatron_lite.pipeline.zero_steps import ZeroSteps, with_zero
from megatron_lite.report.pipeline_picture import DARK_STYLE, STYLE, picture
from megatron_lite.report.pipeline_text import text_picture

GATHER, RELEASE, SUM = Kind.GATHER_PARAMETERS, Kind.RELEASE_PARAMETERS, Kind.START_REDUCTION
GATHERS, REDUCES = ("none", "regather", "keep"), ("none", "step", "microbatch")
SCHEDULES = [(name, v) for name, rule in SCHEDULE_RULES.items() for v in (1, 2, 3) if rule.takes(v)]
STEPS = [ZeroSteps(gather, reduce) for gather, reduce in product(GATHERS, REDUCES)]  # type: ignore[arg-type]


def check_places(schedule: Schedule, steps: ZeroSteps) -> None:
    """An own account of what the lists must hold, beside the prover's."""
    for rank, instructions in enumerate(schedule.lists):
        chunks = schedule.placement.chunks_of(rank)
        whole: dict[int, int] = {}
        owed = dict.fromkeys(chunks, 0)  # gradients of microbatches that are there and not being summed
        sums = dict.fromkeys(chunks, 0)
        for kind, chunk, microbatch in instructions:
            if kind is GATHER:
                assert chunk not in whole
                whole[chunk] = microbatch
            elif kind is RELEASE:
                assert whole.pop(chunk) == microbatch
            elif kind is SUM:
                assert owed[chunk] == (1 if steps.reduce == "microbatch" else schedule.num_microbatches)
                owed[chunk], sums[chunk] = 0, sums[chunk] + 1
            elif kind in USES_PARAMETERS and steps.gather != "none":
                assert whole[chunk] == (microbatch if steps.gather == "regather" else -1)
            if kind in (Kind.BACKWARD, Kind.BACKWARD_WEIGHT):
                owed[chunk] += 1
        assert not whole
        expected = {"none": 0, "step": 1, "microbatch": schedule.num_microbatches}[steps.reduce]
        assert set(sums.values()) == {expected}


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(SCHEDULES),
    pp=st.integers(1, 4),
    microbatches=st.integers(1, 9),
    steps=st.sampled_from(STEPS),
    tied=st.booleans(),
)
def test_every_schedule_is_proven_with_every_policy(
    kind: tuple[str, int], pp: int, microbatches: int, steps: ZeroSteps, tied: bool
) -> None:
    plain = make_schedule(kind[0], pp, kind[1], microbatches)
    schedule = with_zero(plain, steps)
    # What is computed, and in which order, does not change.
    without = [[one for one in instructions if one.kind not in ZERO_STEPS] for instructions in schedule.lists]
    assert without == [list(instructions) for instructions in plain.lists]
    check_places(schedule, steps)
    proof = prove(schedule, dp=2, tp=2, tied=tied)
    assert proof.replicas == (2, 2)
    assert proof.peak_activations == prove(plain).peak_activations


@pytest.mark.parametrize("gather", GATHERS)
def test_an_evaluation_gathers_and_sums_nothing(gather: str) -> None:
    plain = make_schedule("zb-v", 2, 2, 3)
    schedule = with_zero(forward_only(plain.placement, 3), ZeroSteps(gather))  # type: ignore[arg-type]
    prove(schedule, dp=2, tp=2, trains=False)
    kinds = {one.kind for instructions in schedule.lists for one in instructions}
    assert (GATHER in kinds) == (gather != "none") and SUM not in kinds


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("parallel.dp=2 parallel.zero_stage=0", ZeroSteps("none", "step")),
        ("parallel.dp=2", ZeroSteps("none", "step")),
        ("parallel.dp=1", ZeroSteps("none", "none")),
        ("parallel.dp=1 parallel.reduce_policy=microbatch", ZeroSteps("none", "microbatch")),
        ("parallel.dp=2 parallel.reduce_policy=microbatch", ZeroSteps("none", "microbatch")),
        ("parallel.dp=2 parallel.zero_stage=2", ZeroSteps("none", "step")),
        ("parallel.dp=2 parallel.zero_stage=2 parallel.reduce_policy=microbatch", ZeroSteps("none", "microbatch")),
        ("parallel.dp=2 parallel.zero_stage=3", ZeroSteps("regather", "step")),
        ("parallel.dp=2 parallel.zero_stage=3 parallel.gather_policy=keep", ZeroSteps("keep", "step")),
        ("parallel.dp=1 parallel.zero_stage=3", ZeroSteps("regather", "step")),
        (
            "parallel.dp=2 parallel.zero_stage=3 parallel.weight_stashing=true optim.clip_grad_norm=0",
            ZeroSteps("regather", "none"),
        ),
    ],
)
def test_the_steps_of_a_run(keys: str, expected: ZeroSteps) -> None:
    config = load_config(
        None,
        ["model.family=llama", "model.vocab_size=97", "model.hidden_size=32", "model.num_layers=2",
         "model.num_heads=4", "model.max_seq_len=16", "train.seq_len=16", "train.global_batch_size=8",
         "train.num_steps=4", "parallel.pp=2", *keys.split()],
    )  # fmt: skip
    assert ZeroSteps.of(config) == expected
    check_places(schedule_of(config), expected)


# What is wrong, and what is said of it.

Change = Callable[[list[Instruction]], None]


def at(kind: Kind, chunk: int, microbatch: int) -> Instruction:
    return Instruction(kind, chunk, microbatch)


def drop(one: Instruction) -> Change:
    return lambda instructions: instructions.remove(one)


def twice(one: Instruction) -> Change:
    return lambda instructions: instructions.insert(instructions.index(one) + 1, one)


def move(one: Instruction, to_before: Instruction) -> Change:
    def change(instructions: list[Instruction]) -> None:
        instructions.remove(one)
        instructions.insert(instructions.index(to_before), one)

    return change


def replace(one: Instruction, by: Instruction) -> Change:
    def change(instructions: list[Instruction]) -> None:
        instructions[instructions.index(one)] = by

    return change


REGATHER, KEEP, ONCE = ZeroSteps("regather", "microbatch"), ZeroSteps("keep", "step"), ZeroSteps("none", "step")
LAST = 3  # of four microbatches
REDUCE = Instruction(Kind.REDUCE_GRADIENTS)
BROKEN: dict[str, tuple[ZeroSteps, Change, str]] = {
    "a gather is missing": (
        REGATHER,
        drop(at(GATHER, 0, 1)),
        'rank 0: "forward of chunk 0, microbatch 1" stands where the parameters of chunk 0 are not gathered',
    ),
    "the gather of a step is missing": (
        KEEP,
        drop(at(GATHER, 0, -1)),
        'rank 0: "forward of chunk 0, microbatch 0" stands where the parameters of chunk 0 are not gathered',
    ),
    "gathered after its use": (
        KEEP,
        move(at(GATHER, 0, -1), to_before=at(Kind.FORWARD, 0, 1)),
        'rank 0: "forward of chunk 0, microbatch 0" stands where the parameters of chunk 0 are not gathered',
    ),
    "released too early": (
        KEEP,
        move(at(RELEASE, 0, -1), to_before=at(Kind.BACKWARD, 0, LAST)),
        'rank 0: "backward of chunk 0, microbatch 3" stands where the parameters of chunk 0 are not gathered',
    ),
    "never released": (KEEP, drop(at(RELEASE, 0, -1)), 'rank 0: what "gather parameters of chunk 0" gathered is never '
                                                       'released'),
    "released twice": (
        KEEP,
        twice(at(RELEASE, 0, -1)),
        'rank 0: "release parameters of chunk 0" stands there, and nothing is gathered for it',
    ),
    "gathered twice": (
        REGATHER,
        twice(at(GATHER, 0, 1)),
        'rank 0: "gather parameters of chunk 0, microbatch 1" stands before what "gather parameters of chunk 0, '
        'microbatch 1" gathered is released',
    ),
    "gathered for another microbatch": (
        REGATHER,
        replace(at(GATHER, 0, 2), at(GATHER, 0, 3)),
        'rank 0: "forward of chunk 0, microbatch 2" stands where the parameters of chunk 0 are not gathered',
    ),
    "gathered for no microbatch": (
        REGATHER,
        replace(at(GATHER, 0, 2), at(GATHER, 0, 4)),
        'rank 0: "gather parameters of chunk 0, microbatch 4": the step has microbatches 0 to 3',
    ),
    "another rank's chunk": (
        REGATHER,
        replace(at(GATHER, 0, 2), at(GATHER, 1, 2)),
        'rank 0: "gather parameters of chunk 1, microbatch 2" cannot run there: chunk 1 is on rank 1',
    ),
    "a sum before its gradient": (
        REGATHER,
        move(at(SUM, 0, 1), to_before=at(Kind.BACKWARD, 0, 1)),
        'rank 0: "start reduction of chunk 0, microbatch 1" stands before "backward of chunk 0, microbatch 1"',
    ),
    "the sum of a step before its last gradient": (
        ONCE,
        move(at(SUM, 0, LAST), to_before=at(Kind.BACKWARD, 0, LAST)),
        'rank 0: "start reduction of chunk 0, microbatch 3" stands before "backward of chunk 0, microbatch 3"',
    ),
    "a sum twice": (
        REGATHER,
        twice(at(SUM, 0, 1)),
        'rank 0: "start reduction of chunk 0, microbatch 1" stands there twice',
    ),
    "a sum of one microbatch is missing": (
        REGATHER,
        drop(at(SUM, 0, 2)),
        'rank 0: "start reduction of chunk 0, microbatch 2" is missing',
    ),
    "a sum after the end": (
        ONCE,
        lambda instructions: instructions.append(instructions.pop(instructions.index(at(SUM, 0, LAST)))),
        'rank 0: "reduce gradients" stands before "start reduction of chunk 0, microbatch 3"',
    ),
}  # fmt: skip


def schedule_with(steps: ZeroSteps, change: Change | None = None) -> Schedule:
    """1F1B over two ranks and four microbatches, the first rank's list changed."""
    schedule = with_zero(make_schedule("1f1b", 2, 1, 4), steps)
    first = list(schedule.lists[0])
    if change is not None:
        change(first)
    return dataclasses.replace(schedule, lists=(tuple(first), *schedule.lists[1:]))


@pytest.mark.parametrize("name", BROKEN)
def test_diagnosis(name: str) -> None:
    steps, change, diagnosis = BROKEN[name]
    prove(schedule_with(steps), dp=2, tp=2)  # right before it is spoilt
    with pytest.raises(ScheduleError) as error:
        prove(schedule_with(steps, change), dp=2, tp=2)
    assert str(error.value) == diagnosis


def test_a_chunk_without_a_sum() -> None:
    schedule = with_zero(make_schedule("interleaved", 2, 2, 4), ONCE)
    lists = [[one for one in ranks if one.kind is not SUM or one.chunk != 2] for ranks in schedule.lists]
    with pytest.raises(ScheduleError) as error:
        prove(dataclasses.replace(schedule, lists=tuple(lists)), dp=2)
    assert str(error.value) == ("rank 0: the gradients of some chunks are summed in other steps than those of others")


def test_dp_ranks_that_come_to_their_collectives_in_different_orders() -> None:
    """Both lists are right by themselves: a sum may begin any time after its gradient. Together they never end well."""
    one = schedule_with(REGATHER)
    other = schedule_with(REGATHER, move(at(SUM, 0, 0), to_before=at(SUM, 0, 1)))
    for alone in (one, other):
        prove(alone, dp=2)
    with pytest.raises(ScheduleError) as error:
        prove_world([[one], [other]], [Semantics.RENDEZVOUS])
    said = str(error.value)
    assert "over dp is" in said and '"start reduction of chunk 0, microbatch 0" on rank 0 (dp 0, tp 0)' in said
    assert '"gather parameters of chunk 0, ' in said and "on rank 0 (dp 1, tp 0)" in said


# What they cost, and how they look.


@pytest.mark.parametrize(("name", "v"), [("1f1b", 1), ("interleaved", 2), ("zb-h1", 1), ("zb-v", 2)])
def test_a_timeline_grows_by_their_costs(name: str, v: int) -> None:
    """On one rank nothing else waits, so a step is longer by exactly what its steps of ZeRO take."""
    unit = dict(Costs.unit().seconds)
    gather, release, start = Fraction(1, 10), Fraction(1, 1000), Fraction(1, 7)
    costs = Costs(unit | {GATHER: gather, RELEASE: release, SUM: start})
    for steps in STEPS:
        schedule = with_zero(make_schedule(name, 1, v, 4), steps)
        uses = 4 * v * 2 if steps.gather == "regather" else v if steps.gather == "keep" else 0
        sums = {"none": 0, "step": v, "microbatch": 4 * v}[steps.reduce]
        longer = uses * (gather + release) + sums * start
        assert simulate(schedule, costs).makespan == simulate(schedule, Costs(unit)).makespan + longer


def test_more_gathers_take_longer_over_a_pipeline() -> None:
    costs = Costs(dict(Costs.unit().seconds) | {GATHER: Fraction(1, 10), SUM: Fraction(1, 10)})
    plain = make_schedule("1f1b", 4, 1, 8)
    found = [simulate(with_zero(plain, steps), costs).makespan for steps in (ZeroSteps(), KEEP, REGATHER)]
    assert found[0] < found[1] < found[2]


def test_what_is_gathered_and_summed_is_seen() -> None:
    costs = Costs(dict(Costs.unit().seconds) | {GATHER: Fraction(1, 2), SUM: Fraction(1, 2)})
    timeline = simulate(schedule_with(REGATHER), costs)
    text = text_picture(timeline, 160)
    assert "+ gather parameters" in text and "≡ start reduction" in text
    assert "+" in text.splitlines()[0] and "≡" in text.splitlines()[0]
    drawn = picture([("regather", timeline)], "a step")
    assert 'class="pl-g0"' in drawn and 'class="pl-s0"' in drawn
    # Boxes of a rank's second chunk have a shade of their own.
    two_chunks = picture([("zb-v", simulate(with_zero(make_schedule("zb-v", 2, 2, 4), REGATHER), costs))], "a step")
    for look in ("g0", "g1", "s0", "s1"):
        assert f'class="pl-{look}"' in two_chunks and f".pl-{look} {{" in STYLE and f".pl-{look} {{" in DARK_STYLE
    without = picture([("none", simulate(schedule_with(ZeroSteps()), costs))], "a step")
    assert "pl-g0" not in without and "pl-s0" not in without
