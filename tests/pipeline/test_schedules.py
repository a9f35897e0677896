from __future__ import annotations

import itertools

import pytest

from megatron_lite.pipeline.schedules import SCHEDULES, Instruction, Kind, Schedule, forward_only
from tests.pipeline.simulation import BadSchedule, simulate

STAGES, MICROBATCHES = range(1, 9), range(1, 13)


def schedules(name: str, num_stages: int, num_microbatches: int) -> list[Schedule]:
    return [SCHEDULES[name](num_stages, stage, num_microbatches) for stage in range(num_stages)]


@pytest.mark.parametrize("num_stages", STAGES)
def test_1f1b_ends_and_holds_at_most_as_many_microbatches_as_stages_follow(num_stages: int) -> None:
    for m in MICROBATCHES:
        in_flight = simulate(schedules("1f1b", num_stages, m), m)
        assert in_flight == [min(num_stages - stage, m) for stage in range(num_stages)]


@pytest.mark.parametrize("num_stages", STAGES)
def test_gpipe_ends_and_holds_every_microbatch(num_stages: int) -> None:
    for m in MICROBATCHES:
        assert simulate(schedules("gpipe", num_stages, m), m) == [m] * num_stages


@pytest.mark.parametrize("num_stages", STAGES)
def test_evaluation_ends_and_holds_nothing(num_stages: int) -> None:
    for m in (0, *MICROBATCHES):
        plan = [forward_only(num_stages, stage, m) for stage in range(num_stages)]
        assert simulate(plan, m, with_backward=False) == [0] * num_stages


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_stage_alone_communicates_nothing(name: str) -> None:
    (only,) = schedules(name, 1, 3)
    assert {instruction.kind for instruction in only} == {Kind.FORWARD, Kind.BACKWARD, Kind.REDUCE_GRADIENTS}


def find(schedule: Schedule, kind: Kind, microbatch: int = -1) -> int:
    return schedule.index(Instruction(kind, microbatch))


# (stage of 4, two instructions, what the simulation says): exchanging them must be caught.
SWAPS = {
    "forward before its input": (1, (Kind.RECEIVE_ACTIVATION, 2), (Kind.FORWARD, 2), "activation 2 is not there"),
    "sent before it is made": (0, (Kind.FORWARD, 3), (Kind.SEND_ACTIVATION, 3), "output 3 is not there"),
    "two forwards": (3, (Kind.FORWARD, 1), (Kind.FORWARD, 2), "activation 2 is not there"),
    "two backwards": (3, (Kind.BACKWARD, 1), (Kind.BACKWARD, 2), "output of the forward of 2 is not there"),
    "two sends": (1, (Kind.SEND_ACTIVATION, 0), (Kind.SEND_ACTIVATION, 1), "output 1 is not there"),
    "two receives": (2, (Kind.RECEIVE_GRADIENT, 0), (Kind.RECEIVE_GRADIENT, 1), "receives 1, but 0 comes first"),
    "backward before its gradient": (2, (Kind.RECEIVE_GRADIENT, 1), (Kind.BACKWARD, 1), "gradient 1 is not there"),
    "gradient sent before it is made": (2, (Kind.BACKWARD, 1), (Kind.SEND_GRADIENT, 1), "gradient 1 is not there"),
    "reduced before the last gradient": (0, (Kind.BACKWARD, 5), (Kind.REDUCE_GRADIENTS, -1), "before the last"),
    "all wait for all": (2, (Kind.SEND_ACTIVATION, 0), (Kind.RECEIVE_GRADIENT, 0), "deadlock"),
}


@pytest.mark.parametrize("swap", SWAPS)
def test_two_instructions_exchanged_are_caught(swap: str) -> None:
    stage, one, other, message = SWAPS[swap]
    plan = schedules("1f1b", 4, 6)
    simulate(plan, 6)
    i, j = find(plan[stage], *one), find(plan[stage], *other)
    plan[stage][i], plan[stage][j] = plan[stage][j], plan[stage][i]
    with pytest.raises(BadSchedule, match=message):
        simulate(plan, 6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_instruction_left_out_or_repeated_is_caught(name: str) -> None:
    """Each of them, on every stage."""
    for stage, doubled in itertools.product(range(3), (False, True)):
        for place in range(len(schedules(name, 3, 4)[stage])):
            plan = schedules(name, 3, 4)
            plan[stage][place : place + 1] = [plan[stage][place]] * (2 if doubled else 0)
            with pytest.raises(BadSchedule):
                simulate(plan, 4)


def test_a_longer_warm_up_breaks_the_bound_on_memory() -> None:
    """Every stage runs 1F1B as if one more stage followed: correct, and it holds one microbatch more."""
    plan = []
    for stage in range(3):
        order = [i for i in SCHEDULES["1f1b"](5, stage + 1, 8) if i.kind in (Kind.FORWARD, Kind.BACKWARD)]
        instructions: Schedule = []
        for kind, m in ((i.kind, i.microbatch) for i in order):
            ends = {Kind.FORWARD: (Kind.RECEIVE_ACTIVATION, Kind.SEND_ACTIVATION, 0, 2)}
            receive, send, first, last = ends.get(kind, (Kind.RECEIVE_GRADIENT, Kind.SEND_GRADIENT, 2, 0))
            instructions += [Instruction(receive, m)] * (stage != first) + [Instruction(kind, m)]
            instructions += [Instruction(send, m)] * (stage != last)
        plan.append([*instructions, Instruction(Kind.REDUCE_GRADIENTS)])
    assert simulate(plan, 8) == [4, 3, 2] != [min(3 - stage, 8) for stage in range(3)]


def test_text() -> None:
    assert [str(i) for i in SCHEDULES["1f1b"](2, 1, 1)] == [
        "receive activation 0",
        "forward 0",
        "backward 0",
        "send gradient 0",
        "reduce gradients",
    ]
