"""Schedules with a few changes: what the prover accepts can be played, with every tensor made once and used once."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest

from megatron_lite.pipeline.communication import with_communication
from megatron_lite.pipeline.instructions import Instruction, Kind, Placement, Schedule, ScheduleError, loop, vee
from megatron_lite.pipeline.orders import breadth_first, forwards
from megatron_lite.pipeline.prove import prove, world_programs
from megatron_lite.pipeline.prove_lists import check_lists
from megatron_lite.pipeline.prove_programs import Semantics
from tests.pipeline.test_prove_oracle import always_ends


class Player:
    """Plays the lists with sets of tensors: a message waits in a box, a receive for its message."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.placement = schedule, schedule.placement
        self.held: list[set[tuple[str, int, int]]] = [set() for _ in schedule.lists]
        self.box: set[tuple[str, int, int]] = set()
        self.computed: Counter[tuple[str, int, int]] = Counter()
        self.reduced = [False] * len(schedule.lists)

    def play(self) -> None:
        places = [0] * len(self.held)
        moved = True
        while moved:
            moved = False
            for rank, instructions in enumerate(self.schedule.lists):
                while places[rank] < len(instructions) and self.step(rank, instructions[places[rank]]):
                    places[rank] += 1
                    moved = True
        assert places == [*map(len, self.schedule.lists)], "ranks wait"
        assert not self.box and not any(self.held), "something is left"
        chunks, microbatches = range(self.placement.num_chunks), range(self.schedule.num_microbatches)
        for what in ("forward", "input gradient", "weight gradient"):
            assert all(self.computed.pop((what, c, m), 0) == 1 for c in chunks for m in microbatches), what
        assert not self.computed and all(self.reduced)

    def make(self, rank: int, what: str, chunk: int, m: int) -> None:
        assert (what, chunk, m) not in self.held[rank], "made twice"
        self.held[rank].add((what, chunk, m))

    def take(self, rank: int, what: str, chunk: int, m: int) -> None:
        assert (what, chunk, m) in self.held[rank], "used before it is made, or twice"
        self.held[rank].remove((what, chunk, m))

    def step(self, rank: int, instruction: Instruction) -> bool:
        """Runs an instruction, or returns False where it has to wait."""
        kind, c, m = instruction
        if kind is Kind.REDUCE_GRADIENTS:
            assert not self.reduced[rank] and not any(what in ("saved", "half") for what, _, _ in self.held[rank])
            self.reduced[rank] = True
            return True
        assert self.placement.rank_of[c] == rank
        if kind is Kind.RECEIVE_ACTIVATION or kind is Kind.RECEIVE_GRADIENT:
            what = "activation" if kind is Kind.RECEIVE_ACTIVATION else "gradient"
            if (what, c, m) not in self.box:
                return False
            self.box.remove((what, c, m))
            self.make(rank, f"received {what}", c, m)
        elif kind is Kind.SEND_ACTIVATION or kind is Kind.SEND_GRADIENT:
            what, to = ("activation", c + 1) if kind is Kind.SEND_ACTIVATION else ("gradient", c - 1)
            self.take(rank, f"made {what}", c, m)
            self.box.add((what, to, m))
        else:
            assert not self.reduced[rank]
            self.compute(rank, kind, c, m)
        return True

    def compute(self, rank: int, kind: Kind, c: int, m: int) -> None:
        last = self.placement.num_chunks - 1
        if kind is Kind.FORWARD:
            if c > 0:
                self.take(rank, *self.source("activation", c, c - 1), m)
            self.make(rank, "saved", c, m)
            if c < last:
                self.make(rank, "made activation", c, m)
            self.computed["forward", c, m] += 1
        if kind is Kind.BACKWARD or kind is Kind.BACKWARD_INPUT:
            self.take(rank, "saved", c, m)
            if c < last:
                self.take(rank, *self.source("gradient", c, c + 1), m)
            if c > 0:
                self.make(rank, "made gradient", c, m)
            if kind is Kind.BACKWARD_INPUT:
                self.make(rank, "half", c, m)
            self.computed["input gradient", c, m] += 1
        if kind is Kind.BACKWARD_WEIGHT:
            self.take(rank, "half", c, m)
        if kind is Kind.BACKWARD or kind is Kind.BACKWARD_WEIGHT:
            self.computed["weight gradient", c, m] += 1

    def source(self, what: str, chunk: int, neighbour: int) -> tuple[str, int]:
        if self.placement.rank_of[chunk] == self.placement.rank_of[neighbour]:
            return f"made {what}", neighbour
        return f"received {what}", chunk


def in_halves(placement: Placement, num_microbatches: int) -> Schedule:
    """GPipe with split backwards: the halves for the weights come last."""
    orders = forwards(placement, num_microbatches)
    for rank, order in enumerate(orders):
        for kind in (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT):
            chunks = reversed(placement.chunks_of(rank))
            order += [Instruction(kind, chunk, m) for chunk in chunks for m in range(num_microbatches)]
    return Schedule("halves", placement, num_microbatches, with_communication(orders, placement))


def changed(schedule: Schedule, draw: random.Random) -> Schedule:
    lists = [list(one) for one in schedule.lists]
    for _ in range(draw.choice((1, 1, 2, 3))):
        one = draw.choice(lists)
        i, how = draw.randrange(len(one)), draw.random()
        if how < 0.75:
            j = max(0, i - draw.choice((1, 1, 1, 2, 3)))
            one.insert(j, one.pop(i))
        elif how < 0.8:
            one.insert(draw.randrange(len(one)), one[i])
        elif how < 0.85:
            del one[i]
        elif how < 0.95:
            one[i] = one[i]._replace(kind=draw.choice(list(Kind)))
        else:
            one[i] = one[i]._replace(microbatch=draw.randrange(schedule.num_microbatches))
    return Schedule("changed", schedule.placement, schedule.num_microbatches, tuple(tuple(one) for one in lists))


def is_proven(schedule: Schedule) -> bool:
    try:
        prove(schedule)
    except ScheduleError:
        return False
    return True


PLACEMENTS = [loop(1), loop(2), loop(3), loop(2, 2), vee(2), Placement((0, 0, 1, 1))]


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda placement: "".join(map(str, placement.rank_of)))
def test_what_is_proven_can_be_played(placement: Placement) -> None:
    draw = random.Random(str(placement))
    verdicts: Counter[bool] = Counter()
    for _ in range(300):
        m = draw.randint(1, 3)
        whole = Schedule("gpipe", placement, m, with_communication(breadth_first(placement, m), placement))
        schedule = changed(draw.choice((whole, in_halves(placement, m))), draw)
        verdict = is_proven(schedule)
        verdicts[verdict] += 1
        if verdict:
            Player(schedule).play()
    assert min(verdicts[True], verdicts[False]) > 15, verdicts


@pytest.mark.parametrize("placement", [loop(2), vee(2), loop(3)], ids=["2", "vee", "3"])
def test_whether_a_schedule_ends_is_what_all_interleavings_say(placement: Placement) -> None:
    draw = random.Random(7)
    verdicts: Counter[bool] = Counter()
    while verdicts.total() < 60:
        m = 2 if placement.num_ranks == 2 else 1
        schedule = Schedule("gpipe", placement, m, with_communication(breadth_first(placement, m), placement))
        schedule = changed(schedule, draw)
        try:
            check_lists(schedule)
        except ScheduleError:
            continue
        programs = world_programs([[schedule]])
        ends = all(always_ends(programs, semantics) for semantics in Semantics)
        assert is_proven(schedule) == ends
        verdicts[ends] += 1
    assert min(verdicts[True], verdicts[False]) >= 5, verdicts


@pytest.mark.slow
def test_sixty_four_ranks_take_seconds() -> None:
    """A quarter of 64 ranks x 512 microbatches x 4 chunks, for which a core takes about 5 s."""
    placement = loop(64, 4)
    schedule = Schedule("gpipe", placement, 128, with_communication(breadth_first(placement, 128), placement))
    began = time.process_time()
    assert prove(schedule).num_instructions == 64 + 128 * (2 * 256 + 4 * 255)
    assert time.process_time() - began < 10
