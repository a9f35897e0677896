"""What a schedule should take: its lists played through, with a cost for each instruction and a time for each message.

The rules are those of the runner. A send starts the message and goes on. Receives are posted ahead, so a message sets
out when it is sent, behind what is still on its way over the same link in the same direction. The instruction that uses
a tensor waits for it; nothing else waits.

All arithmetic is that of the numbers given: with ints or Fractions the results are exact.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from statistics import median

from megatron_lite.pipeline.communication import UNIT_COSTS
from megatron_lite.pipeline.instructions import (
    COMPUTES,
    SENDS,
    Instruction,
    Kind,
    Placement,
    Schedule,
    ScheduleError,
)
from megatron_lite.pipeline.timeline import Span, Timeline


@dataclass(frozen=True)
class Costs:
    """Seconds that a rank is busy with an instruction, by its kind: one number, or one for each chunk (for what has no
    chunk: one for each rank). Only computing has to be given; the rest is free where it is not."""

    seconds: Mapping[Kind, float | Sequence[float]]

    @staticmethod
    def unit() -> Costs:
        """A forward and each half of a backward take 1."""
        return Costs(UNIT_COSTS)

    @staticmethod
    def measured(timeline: Timeline) -> Costs:
        """The medians of a timeline, over the microbatches of each chunk."""
        placement, found = timeline.placement, defaultdict[tuple[Kind, int], list[float]](list)
        for rank, spans in enumerate(timeline.ranks):
            for span in spans:
                kind, chunk, _ = span.instruction
                found[kind, rank if chunk < 0 else chunk].append(span.end - span.began)
        has_chunk = {span.instruction.kind for spans in timeline.ranks for span in spans if span.instruction.chunk >= 0}
        return Costs(
            {
                kind: [
                    median(found.get((kind, place), [0]))
                    for place in range(placement.num_chunks if kind in has_chunk else placement.num_ranks)
                ]
                for kind in dict.fromkeys(kind for kind, _ in found)
            }
        )

    def of(self, instruction: Instruction, rank: int) -> float:
        """Raises ScheduleError for computing that has no cost."""
        kind, chunk, _ = instruction
        given = self.seconds.get(kind)
        if given is None:
            if kind in COMPUTES:
                raise ScheduleError(f"no cost is given for {instruction}: give seconds for Kind.{kind.name}")
            return 0
        if not isinstance(given, Sequence):
            return given
        place = rank if chunk < 0 else chunk
        if place >= len(given):
            raise ScheduleError(f"Kind.{kind.name} has {len(given)} costs, and none for {instruction} on rank {rank}")
        return given[place]


@dataclass(frozen=True)
class Links:
    """A message needs its bytes' time on the link (``bytes_per_s``; None: no time), one after the other, and
    ``latency_s`` more until it is there. ``message_bytes``: an activation's, or a gradient's, which is as large."""

    latency_s: float = 0
    bytes_per_s: float | None = None
    message_bytes: int = 0

    @staticmethod
    def measured(timeline: Timeline) -> Links:
        """The median time of those messages of a timeline that someone waited for, as a latency."""
        placement = timeline.placement
        sent = {
            _sent(span.instruction): span.end
            for span in chain.from_iterable(timeline.ranks)
            if span.instruction.kind in SENDS
        }
        times = [
            span.began - sent[needed]
            for span in chain.from_iterable(timeline.ranks)
            if span.waited > 0 and (needed := _needed(span.instruction, placement)) is not None and needed in sent
        ]
        return Links(latency_s=max(0, median(times))) if times else Links()

    @property
    def busy_s(self) -> float | Fraction:
        """How long one message keeps a link."""
        return 0 if self.bytes_per_s is None else Fraction(self.message_bytes) / self.bytes_per_s


def simulate(schedule: Schedule, costs: Costs, links: Links | None = None) -> Timeline:
    """The timeline of a schedule; links: None for messages that take no time.

    Raises ScheduleError where ranks wait for each other, or for what nobody sends, and where a cost is missing.
    """
    links = Links() if links is None else links
    placement, busy_s = schedule.placement, links.busy_s
    arrivals: dict[_Message, float] = {}
    waiting: dict[_Message, tuple[int, Instruction]] = {}  # the rank that waits for it, and with what
    free: dict[tuple[int, int], float] = defaultdict(int)  # from when a link, from rank to rank, carries nothing
    spans: list[list[Span]] = [[] for _ in schedule.lists]
    clocks: list[float] = [0] * len(schedule.lists)
    ready = list(range(len(schedule.lists)))
    while ready:
        rank = ready.pop()
        instructions, done, clock = schedule.lists[rank], spans[rank], clocks[rank]
        while len(done) < len(instructions):
            instruction = instructions[len(done)]
            waited: float = 0
            needed = _needed(instruction, placement)
            if needed is not None:
                if needed not in arrivals:
                    waiting[needed] = rank, instruction
                    break
                waited = max(0, arrivals.pop(needed) - clock)
            start, clock = clock, clock + waited + costs.of(instruction, rank)
            done.append(Span(instruction, start, clock, waited))
            if instruction.kind in SENDS:
                message = _sent(instruction)
                link = rank, placement.rank_of[message[1]]
                free[link] = max(free[link], clock) + busy_s
                arrivals[message] = free[link] + links.latency_s
                if message in waiting:
                    ready.append(waiting.pop(message)[0])
        clocks[rank] = clock
    if waiting:
        stuck = sorted(f"rank {rank} waits for the tensor of {instruction}" for rank, instruction in waiting.values())
        raise ScheduleError(f"the schedule {schedule.name} never ends: {'; '.join(stuck)}")
    return Timeline(schedule.name, placement, schedule.num_microbatches, tuple(map(tuple, spans)))


# (whether it is a gradient, the chunk that uses it, microbatch)
_Message = tuple[bool, int, int]


def _sent(send: Instruction) -> _Message:
    if send.kind is Kind.SEND_ACTIVATION:
        return False, send.chunk + 1, send.microbatch
    return True, send.chunk - 1, send.microbatch


def _needed(instruction: Instruction, placement: Placement) -> _Message | None:
    """The message that an instruction cannot begin without."""
    kind, chunk, microbatch = instruction
    if kind is Kind.FORWARD and chunk > 0 and not placement.is_local(chunk - 1):
        return False, chunk, microbatch
    is_last = chunk + 1 == placement.num_chunks
    if kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT) and not is_last and not placement.is_local(chunk):
        return True, chunk, microbatch
    return None
