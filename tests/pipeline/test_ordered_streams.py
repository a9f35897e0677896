"""The schedules on a device whose process groups are ordered streams, as NCCL's are: do they end?

Each stage has a compute stream, and one stream for each of the groups ``pp`` and ``pp_return``. What is started on a
group runs in that order, and a send and its receive meet: neither ends before the other has begun.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import pytest

from megatron_lite.pipeline.schedules import SCHEDULES, Kind, Schedule

# Instruction -> (group, neighbour)
SENDS = {Kind.SEND_ACTIVATION: ("pp", +1), Kind.SEND_GRADIENT: ("pp_return", -1)}
RECEIVES = {Kind.RECEIVE_ACTIVATION: ("pp", -1), Kind.RECEIVE_GRADIENT: ("pp_return", +1)}


@dataclass
class Transfer:
    peer: int
    is_send: bool
    is_ready: bool  # a send is, once the compute stream has come to it
    is_done: bool = False


@dataclass
class Streams:
    """What a stage's host has started, in order. ``compute`` holds transfers to wait for or to release."""

    compute: deque[Transfer] = field(default_factory=deque)
    groups: dict[str, deque[Transfer]] = field(default_factory=lambda: {"pp": deque(), "pp_return": deque()})


def start(stage: int, schedule: Schedule, posts_ahead: bool) -> Streams:
    streams = Streams()
    posted: dict[Kind, deque[Transfer]] = {kind: deque() for kind in RECEIVES}
    left = {kind: sum(i.kind is kind for i in schedule) for kind in RECEIVES}

    def post(kind: Kind) -> None:
        if left[kind]:
            left[kind] -= 1
            group, neighbour = RECEIVES[kind]
            posted[kind].append(Transfer(stage + neighbour, is_send=False, is_ready=True))
            streams.groups[group].append(posted[kind][-1])

    for kind in RECEIVES if posts_ahead else ():
        post(kind)
    for instruction in schedule:
        if instruction.kind in RECEIVES:
            if not posts_ahead:
                post(instruction.kind)
            streams.compute.append(posted[instruction.kind].popleft())
            if posts_ahead:
                post(instruction.kind)
        elif instruction.kind in SENDS:
            group, neighbour = SENDS[instruction.kind]
            transfer = Transfer(stage + neighbour, is_send=True, is_ready=False)
            streams.groups[group].append(transfer)
            streams.compute.append(transfer)
    return streams


def ends(schedules: list[Schedule], posts_ahead: bool) -> bool:
    stages = [start(stage, schedule, posts_ahead) for stage, schedule in enumerate(schedules)]
    moved = True
    while moved:
        moved = False
        for stage, streams in enumerate(stages):
            while streams.compute and (streams.compute[0].is_send or streams.compute[0].is_done):
                streams.compute.popleft().is_ready = True
                moved = True
            for group, queue in streams.groups.items():
                if not queue or not queue[0].is_send or not queue[0].is_ready:
                    continue
                other = stages[queue[0].peer].groups[group]
                if other and not other[0].is_send and other[0].peer == stage:
                    queue.popleft().is_done = True
                    other.popleft().is_done = True
                    moved = True
    return not any(s.compute or any(s.groups.values()) for s in stages)


def all_stages(name: str, num_stages: int, num_microbatches: int) -> list[Schedule]:
    return [SCHEDULES[name](num_stages, stage, num_microbatches) for stage in range(num_stages)]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_stages", range(1, 9))
def test_receives_that_are_posted_when_used_never_stop_a_schedule(name: str, num_stages: int) -> None:
    for num_microbatches in range(1, 20):
        assert ends(all_stages(name, num_stages, num_microbatches), posts_ahead=False), num_microbatches


def test_receives_that_are_posted_ahead_stop_1f1b() -> None:
    """Negative control, and the reason why the inbox posts ahead on gloo only."""
    assert not ends(all_stages("1f1b", 4, 5), posts_ahead=True)
    assert ends(all_stages("1f1b", 2, 5), posts_ahead=True)
