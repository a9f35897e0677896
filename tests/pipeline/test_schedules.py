"""That each schedule is a step, whatever its size: all instructions once, in order, and no rank waits for ever."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest

from megatron_lite.config.schedules import SCHEDULE_RULES
from megatron_lite.pipeline.communication import start_times, with_communication
from megatron_lite.pipeline.instructions import Instruction, Kind, Placement, Schedule, ScheduleError, loop
from megatron_lite.pipeline.schedules import SCHEDULES, forward_only, make_schedule
from tests.pipeline.simulation import BadSchedule, check, computes, play


def virtual_stages_of(name: str) -> list[int]:
    fewest, most = SCHEDULE_RULES[name].virtual_stages
    return list(range(fewest, (most or 4) + 1))


def test_rules_and_schedules_agree() -> None:
    assert SCHEDULE_RULES.keys() == SCHEDULES.keys()
    for name in SCHEDULE_RULES:
        for p in (1, 2, 5, 8):
            for v in virtual_stages_of(name):
                check(make_schedule(name, p, v, 1))


@pytest.mark.parametrize("name", SCHEDULES)
def test_small_sizes(name: str) -> None:
    for p in range(1, 6):
        for v in virtual_stages_of(name)[:2]:
            for m in range(1, 2 * p + 3):
                check(make_schedule(name, p, v, m))


@pytest.mark.parametrize("name", SCHEDULES)
def test_random_sizes(name: str) -> None:
    """Seeded, so that a failure comes again."""
    draw = random.Random(f"sizes for {name}")
    for _ in range(15):
        p, v, m = draw.randint(1, 16), draw.choice(virtual_stages_of(name)), draw.randint(1, 40)
        schedule = make_schedule(name, p, v, m)
        assert schedule.placement.num_chunks == p * v, (p, v, m)
        assert schedule.num_microbatches == m
        check(schedule)


@pytest.mark.parametrize("name", SCHEDULES)
def test_start_times_are_those_of_the_oracle(name: str) -> None:
    v = virtual_stages_of(name)[-1]
    schedule = make_schedule(name, 5, v, 11)
    orders = computes(schedule)
    starts = start_times(orders, schedule.placement)
    times = play([[(compute,) for compute in order] for order in orders], schedule.placement)
    ends = [
        times[-1] + (2 if order[-1].kind is Kind.BACKWARD else 1) for times, order in zip(starts, orders, strict=True)
    ]
    work = [sum(2 if compute.kind is Kind.BACKWARD else 1 for compute in order) for order in orders]
    assert [max(ends) - busy for busy in work] == times.idle_of_step
    assert [end - begin[0] - busy for end, begin, busy in zip(ends, starts, work, strict=True)] == times.idle_between


def test_one_chunk_a_rank_is_the_schedule_without_virtual_stages() -> None:
    for p in (1, 2, 5):
        for m in (1, 4, 11):
            assert make_schedule("interleaved", p, 1, m).lists == make_schedule("1f1b", p, 1, m).lists
            assert make_schedule("breadth-first", p, 1, m).lists == make_schedule("gpipe", p, 1, m).lists
    assert make_schedule("interleaved", 3, 2, 6).lists != make_schedule("breadth-first", 3, 2, 6).lists


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_rank_alone_communicates_nothing(name: str) -> None:
    for v in virtual_stages_of(name):
        (only,) = make_schedule(name, 1, v, 3).lists
        assert not {instruction.kind for instruction in only} & {Kind.SEND_ACTIVATION, Kind.RECEIVE_GRADIENT}


def test_evaluation_ends_and_holds_nothing() -> None:
    for p in range(1, 6):
        for v in (1, 2, 3):
            for m in (0, 1, 4, 7):
                assert check(forward_only(loop(p, v), m), with_backward=False) == [0] * p


def test_names_and_sizes_that_cannot_be() -> None:
    with pytest.raises(ScheduleError, match=r"no schedule is named 'zb-h3': choose gpipe, 1f1b, .*or a file PATH\.csv"):
        make_schedule("zb-h3", 2, 1, 4)
    for name in ("zb-v", "dualpipe-v"):
        with pytest.raises(ScheduleError, match=r"2 chunks here, not 1: set parallel\.virtual_stages=2"):
            make_schedule(name, 2, 1, 4)


# What follows: that `check` sees what is wrong.


def changed(schedule: Schedule, rank: int, instructions: list[Instruction]) -> Schedule:
    return replace(schedule, lists=(*schedule.lists[:rank], tuple(instructions), *schedule.lists[rank + 1 :]))


# (rank of 4, two instructions, what the oracle says): exchanging them must be caught.
FORWARD, BACKWARD = Kind.FORWARD, Kind.BACKWARD
SWAPS = {
    "forward before its input": (1, (Kind.RECEIVE_ACTIVATION, 2), (FORWARD, 2), "activation for of 1, 2 is not there"),
    "sent before it is made": (0, (FORWARD, 3), (Kind.SEND_ACTIVATION, 3), "made activation of 0, 3 is not there"),
    "two forwards": (3, (FORWARD, 1), (FORWARD, 2), "activation for of 3, 2 is not there"),
    "two backwards": (3, (BACKWARD, 1), (BACKWARD, 2), "saved activation of 3, 2 is not there"),
    "two sends": (1, (Kind.SEND_ACTIVATION, 0), (Kind.SEND_ACTIVATION, 1), "deadlock"),
    "two receives": (2, (Kind.RECEIVE_GRADIENT, 0), (Kind.RECEIVE_GRADIENT, 1), "deadlock"),
    "backward before its gradient": (2, (Kind.RECEIVE_GRADIENT, 1), (BACKWARD, 1), "gradient for of 2, 1 is not there"),
    "gradient sent before it is made": (2, (BACKWARD, 5), (Kind.SEND_GRADIENT, 5), "made gradient of 2, 5 is not"),
    "reduced before the last gradient": (0, (BACKWARD, 5), (Kind.REDUCE_GRADIENTS, -1), "reduces before its last"),
    "forwards out of order on the first rank": (0, (FORWARD, 4), (FORWARD, 5), "made activation of 0, 4 is not there"),
}


@pytest.mark.parametrize("swap", SWAPS)
def test_two_instructions_exchanged_are_caught(swap: str) -> None:
    rank, one, other, message = SWAPS[swap]
    schedule = make_schedule("1f1b", 4, 1, 6)
    check(schedule)
    instructions = list(schedule.lists[rank])
    places = [
        next(place for place, i in enumerate(instructions) if (i.kind, i.microbatch) == wanted)
        for wanted in (one, other)
    ]
    i, j = places
    instructions[i], instructions[j] = instructions[j], instructions[i]
    with pytest.raises(BadSchedule, match=message):
        check(changed(schedule, rank, instructions))


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_instruction_left_out_or_repeated_is_caught(name: str) -> None:
    """Each of them, on every rank."""
    schedule = make_schedule(name, 3, virtual_stages_of(name)[-1], 4)
    for rank, instructions in enumerate(schedule.lists):
        for place, instruction in enumerate(instructions):
            for times in (0, 2):
                broken = [*instructions[:place], *[instruction] * times, *instructions[place + 1 :]]
                with pytest.raises(BadSchedule):
                    check(changed(schedule, rank, broken))


def test_microbatches_out_of_order_are_caught() -> None:
    """On one rank nothing else is wrong with it."""
    order = [Instruction(kind, 0, m) for kind, m in ((FORWARD, 0), (FORWARD, 1), (BACKWARD, 1), (BACKWARD, 0))]
    lists = with_communication([order], Placement((0,)))
    with pytest.raises(BadSchedule, match=re.escape("chunk 0: input halfs [1, 0]")):
        check(Schedule("last in, first out", Placement((0,)), 2, lists))


def test_orders_that_wait_for_each_other_are_named() -> None:
    orders = computes(make_schedule("1f1b", 2, 1, 2))
    orders[0][0], orders[0][1] = orders[0][1], orders[0][0]  # forward 1 before the backward 0 that follows forward 0
    orders = [[orders[0][1], *orders[0][2:], orders[0][0]], orders[1]]
    with pytest.raises(ScheduleError) as error:
        with_communication(orders, loop(2))
    assert str(error.value) == (
        "the order of computing never ends: "
        "rank 0 waits at backward of chunk 0, microbatch 1 for forward of chunk 0, microbatch 1; "
        "rank 1 waits at forward of chunk 1, microbatch 1 for forward of chunk 0, microbatch 1"
    )
