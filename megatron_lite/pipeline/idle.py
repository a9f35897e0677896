"""Why the ranks of a pipeline stand still, and how much of a step that is: of any timeline, simulated or recorded.

Behind every instruction stands a chain, without a gap, from the beginning of the step: what it waited for, what that
one waited for, and so on (its critical path). A rank waits where the chain of the tensor is longer than that of the
rank itself, and the difference says why: in the usual costs of the instructions on both (`Cause.RAMP`: so long would
the rank wait if all chunks took the same time and messages none), in what they took beyond that (`Cause.IMBALANCE`), in
messages (`Cause.COMMUNICATION`), and in time in which the host did nothing (`Cause.HOST`). The same holds for the end
of a rank, which waits for the end of the step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from functools import cached_property
from statistics import median_low
from typing import NamedTuple

from megatron_lite.pipeline.instructions import RECEIVES, SENDS, Instruction, Kind, ScheduleError
from megatron_lite.pipeline.timeline import Span, Timeline, activations_alive

_BACKWARDS = frozenset({Kind.BACKWARD, Kind.BACKWARD_INPUT})
_MESSAGES = SENDS | RECEIVES
TAKING = 50  # a wait of less than this part of what the instruction usually takes is no wait for another rank


class Cause(Enum):
    RAMP = "warm-up and cool-down"
    IMBALANCE = "imbalance"
    COMMUNICATION = "communication"
    HOST = "outside of instructions"


class Idle(NamedTuple):
    """A time in which a rank does not compute. Where a wait has several causes, each has a part of it, and which part
    of the wait is which means nothing."""

    start: float
    end: float
    cause: Cause


class _Chain(NamedTuple):
    """The length of a critical path, by what it is made of: the usual costs, what instructions took beyond them,
    messages, nothing."""

    ramp: float = 0
    imbalance: float = 0
    communication: float = 0
    host: float = 0

    def plus(self, ramp: float, imbalance: float, communication: float, host: float) -> _Chain:
        return _Chain(
            self.ramp + ramp, self.imbalance + imbalance, self.communication + communication, self.host + host
        )


def idle_times(timeline: Timeline) -> tuple[tuple[Idle, ...], ...]:
    """The times in which each rank does not compute, in order, from the first start to the last end of all ranks.

    With what is computed (all instructions but messages) they fill each rank's row without a gap. Raises ScheduleError
    for a timeline that cannot have been, whose ranks wait for each other.
    """
    makers, usual = _makers(timeline), _usual_costs(timeline)
    chains = _chains(timeline, makers, usual)
    ends = [(spans[-1].end, rank) for rank, spans in enumerate(timeline.ranks) if spans]
    last = chains[max(ends)[1]][-1] if ends else _Chain()
    return tuple(tuple(_joined(_row(rank, timeline, chains, makers, usual, last))) for rank in range(len(chains)))


def _row(
    rank: int,
    timeline: Timeline,
    chains: Sequence[Sequence[_Chain]],
    makers: Mapping[Instruction, tuple[int, int]],
    usual: Mapping[Kind, float],
    last: _Chain,
) -> Iterator[Idle]:
    """The idle times of one rank, neighbours of one cause apart."""
    cursor, own = timeline.begin, _Chain()
    for place, span in enumerate(timeline.ranks[rank]):
        yield Idle(cursor, span.start, Cause.HOST)
        maker = _awaited(span, makers, usual)
        if maker is None:
            yield Idle(span.start, span.began, Cause.COMMUNICATION)
        else:
            made_at = timeline.ranks[maker[0]][maker[1]].end
            other = chains[maker[0]][maker[1]].plus(0, 0, span.began - made_at, 0)
            yield from _parts(span.start, span.began, other, own.plus(0, 0, 0, max(0, span.start - cursor)))
        if span.instruction.kind in _MESSAGES:
            yield Idle(span.began, span.end, Cause.COMMUNICATION)
        cursor, own = max(cursor, span.end), chains[rank][place]
    yield from _parts(cursor, timeline.end, last, own)


def _parts(start: float, end: float, other: _Chain, own: _Chain) -> Iterator[Idle]:
    """A wait, divided in the proportions in which the chain that it waited for is longer than the rank's own."""
    longer = [max(0, theirs - mine) for theirs, mine in zip(other, own, strict=True)]
    total = sum(longer)
    if not total:  # by clocks that differ, the tensor was there
        longer, total = [0, 0, 1, 0], 1
    at = start
    for cause, part in zip(Cause, longer, strict=True):
        # Nothing is divided where the parts add up: ints stay ints.
        until = at + (part if total == end - start else (end - start) * _over(part, total))
        yield Idle(at, until, cause)
        at = until


def _makers(timeline: Timeline) -> dict[Instruction, tuple[int, int]]:
    """(rank, place) of what makes each tensor; a whole backward makes what its input half does."""
    return {
        one._replace(kind=Kind.BACKWARD_INPUT) if one.kind in _BACKWARDS else one: (rank, place)
        for rank, spans in enumerate(timeline.ranks)
        for place, (one, *_) in enumerate(spans)
        if one.kind not in _MESSAGES
    }


def _needed(instruction: Instruction) -> Instruction:
    """What makes the tensor that an instruction waits for."""
    kind, chunk, microbatch = instruction
    if kind in (Kind.FORWARD, Kind.RECEIVE_ACTIVATION):
        return Instruction(Kind.FORWARD, chunk - 1, microbatch)
    return Instruction(Kind.BACKWARD_INPUT, chunk + 1, microbatch)


def _awaited(
    span: Span, makers: Mapping[Instruction, tuple[int, int]], usual: Mapping[Kind, float]
) -> tuple[int, int] | None:
    """Who made the tensor that a span waited for: None unless that was made too late. To be handed one that is there
    takes time too; that time says nothing of when the tensor was made."""
    is_late = span.waited * TAKING > usual[span.instruction.kind] and span.waited > 0
    return makers.get(_needed(span.instruction)) if is_late else None


def _chains(
    timeline: Timeline, makers: Mapping[Instruction, tuple[int, int]], usual: Mapping[Kind, float]
) -> list[list[_Chain]]:
    """The critical path to the end of each span."""
    chains: list[list[_Chain]] = [[] for _ in timeline.ranks]
    waiting: dict[tuple[int, int], list[int]] = defaultdict(list)  # (rank, place) -> ranks that wait for its end
    ready = list(range(len(chains)))
    while ready:
        rank = ready.pop()
        spans, done = timeline.ranks[rank], chains[rank]
        while len(done) < len(spans):
            span = spans[len(done)]
            before = spans[len(done) - 1].end if done else timeline.begin
            chain = (done[-1] if done else _Chain()).plus(0, 0, 0, max(0, span.start - before))
            maker = _awaited(span, makers, usual)
            if maker is not None:
                if maker[1] >= len(chains[maker[0]]):
                    waiting[maker].append(rank)
                    break
                made_at = timeline.ranks[maker[0]][maker[1]].end
                chain = chains[maker[0]][maker[1]].plus(0, 0, span.began - made_at, 0)
            else:
                chain = chain.plus(0, 0, span.waited, 0)
            cost = span.end - span.began
            kind = span.instruction.kind
            parts = (0, 0, cost, 0) if kind in _MESSAGES else (usual[kind], cost - usual[kind], 0, 0)
            done.append(chain.plus(*parts))
            ready += waiting.pop((rank, len(done) - 1), [])
    if waiting:
        stuck = sorted(rank for ranks in waiting.values() for rank in ranks)
        raise ScheduleError(f"ranks {stuck} of the timeline wait for each other: it cannot have been")
    return chains


def _usual_costs(timeline: Timeline) -> dict[Kind, float]:
    """The median over all ranks of each kind of instruction: an outlier is one, wherever it stands."""
    found = defaultdict[Kind, list[float]](list)
    for spans in timeline.ranks:
        for span in spans:
            found[span.instruction.kind].append(span.end - span.began)
    return {kind: median_low(times) for kind, times in found.items()}


def _joined(times: Iterator[Idle]) -> Iterator[Idle]:
    """Neighbours of one cause as one."""
    last: Idle | None = None
    for idle in times:
        if idle.end <= idle.start:
            continue
        if last is not None and last.end == idle.start and last.cause is idle.cause:
            last = last._replace(end=idle.end)
            continue
        if last is not None:
            yield last
        last = idle
    if last is not None:
        yield last


@dataclass(frozen=True)
class Facts:
    """A timeline in numbers, seconds, one entry a rank. busy: at work. idle: not, by cause; both together are the
    makespan. windows: from the beginning of a rank's first work to the end of its last. peak_activations: the most
    microbatches of a chunk that it kept for their backwards at a time (`activations_alive`)."""

    makespan: float
    busy: tuple[float, ...]
    idle: tuple[dict[Cause, float], ...]
    windows: tuple[float, ...]
    peak_activations: tuple[float, ...]

    @cached_property
    def idle_by_cause(self) -> dict[Cause, float]:
        """Summed over the ranks."""
        return {cause: sum(rank[cause] for rank in self.idle) for cause in Cause}

    @property
    def bubble_share(self) -> float | Fraction:
        """Idle time over makespan x ranks."""
        return _over(sum(self.idle_by_cause.values()), self.makespan * len(self.busy))

    @property
    def bubble_ratio(self) -> float | Fraction:
        """Idle time over the time at work, which an ideal pipeline needs: (p - 1) / m in 1F1B with equal costs."""
        return _over(sum(self.idle_by_cause.values()), sum(self.busy))

    @property
    def window_ratio(self) -> float | Fraction:
        """The most that a rank stands still between its own first and last work, over its time at work. This is the
        bubble of Qi et al. 2024, section 2, where the next step may begin on a rank before this one ends on others."""
        return max(_over(window - busy, busy) for window, busy in zip(self.windows, self.busy, strict=True))


def _over(part: float, whole: float) -> float | Fraction:
    """Exact for ints and Fractions."""
    return Fraction(part) / whole if whole else 0


def facts_of(timeline: Timeline, sizes: Sequence[float] | None = None) -> Facts:
    """sizes: of an activation of each chunk, for the peaks; None counts chunks."""
    idle = [
        {cause: sum(one.end - one.start for one in row if one.cause is cause) for cause in Cause}
        for row in idle_times(timeline)
    ]
    work = [[span for span in spans if span.instruction.kind not in _MESSAGES] for spans in timeline.ranks]
    return Facts(
        makespan=timeline.makespan,
        busy=tuple(sum(span.end - span.began for span in spans) for spans in work),
        idle=tuple(idle),
        windows=tuple(spans[-1].end - spans[0].began if spans else 0 for spans in work),
        peak_activations=tuple(
            max((amount for _, amount in steps), default=0) for steps in activations_alive(timeline, sizes)
        ),
    )
