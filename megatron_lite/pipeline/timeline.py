"""When each instruction of a step ran, on every rank: what a simulation predicts, and what a run records."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from megatron_lite.pipeline.instructions import COMPUTES, Instruction, Kind, Placement, Schedule
from megatron_lite.utils.files import AtomicFile, DataError

NS = 1e-9


class Span(NamedTuple):
    """One instruction, from ``start`` to ``end``, seconds since the step's beginning. ``waited``: how much of it the
    rank waited for a tensor of another one, at its start.

    The times may be of any exact type (int, Fraction): whatever is computed of them stays exact.
    """

    instruction: Instruction
    start: float
    end: float
    waited: float = 0

    @property
    def began(self) -> float:
        """When the waiting was over and the work began."""
        return self.start + self.waited


@dataclass(frozen=True)
class Timeline:
    """One step: ``ranks[rank]`` holds the spans of a pipeline rank in the order in which they ran.

    step: its number, where it was recorded; None where it was simulated. chunk_layers: number of layers of each chunk,
    where it was recorded.
    """

    schedule: str
    placement: Placement
    num_microbatches: int
    ranks: tuple[tuple[Span, ...], ...]
    step: int | None = None
    chunk_layers: tuple[int, ...] = ()

    @cached_property
    def begin(self) -> float:
        return min((span.start for rank in self.ranks for span in rank), default=0)

    @cached_property
    def end(self) -> float:
        return max((span.end for rank in self.ranks for span in rank), default=0)

    @property
    def makespan(self) -> float:
        """From the first start to the last end, seconds."""
        return self.end - self.begin

    def as_schedule(self) -> Schedule:
        """The lists that ran, wherever they came from: a schedule's name, or a file."""
        lists = tuple(tuple(span.instruction for span in rank) for rank in self.ranks)
        return Schedule(self.schedule, self.placement, self.num_microbatches, lists)


def activations_alive(timeline: Timeline, sizes: Sequence[float] | None = None) -> list[list[tuple[float, float]]]:
    """What each rank keeps for its backwards, over time: (from when, how much) at each change, in order of time.

    From the beginning of a forward to the end of its backward, or of its weight half. sizes: bytes of one microbatch
    in each chunk; None counts chunks. A timeline without backwards keeps nothing.
    """
    return [list(_alive(spans, sizes)) for spans in timeline.ranks]


def _alive(spans: Sequence[Span], sizes: Sequence[float] | None) -> Iterator[tuple[float, float]]:
    freeing = _last_uses(spans)
    changes: dict[float, float] = {}
    for span in spans:
        kind, chunk, microbatch = span.instruction
        size = 1 if sizes is None or chunk < 0 else sizes[chunk]
        if kind is Kind.FORWARD and (chunk, microbatch) in freeing:
            changes[span.began] = changes.get(span.began, 0) + size
        elif freeing.get((chunk, microbatch)) is kind:
            changes[span.end] = changes.get(span.end, 0) - size
    amount: float = 0
    for when, change in sorted(changes.items()):
        amount += change
        yield when, amount


def _last_uses(spans: Sequence[Span]) -> dict[tuple[int, int], Kind]:
    """The kind of the last instruction that needs the activations of a (chunk, microbatch)."""
    uses: dict[tuple[int, int], Kind] = {}
    for span in spans:
        kind, chunk, microbatch = span.instruction
        if kind in COMPUTES and kind is not Kind.FORWARD:
            uses[chunk, microbatch] = kind
    return uses


def _seconds_of_ns(first: int, last: int) -> float:
    return (last - first) * NS


class Recorder:
    """Takes down when a rank begins and ends each instruction of one step, and how long it waited for a tensor.

    The runner calls ``begin``, then ``arrived`` when a tensor that was not there yet has come, then ``end``.

    mark: takes the time, in whatever form; seconds: from one mark to another, read when the step is over. Both are for
    devices that run behind the host: CUDA events (``mark`` records one, ``seconds`` is ``elapsed_time / 1000``), for
    which the device has to be idle when the recorder is made. now_ns: the host's clock, by which ranks are aligned.
    """

    def __init__(
        self,
        mark: Callable[[], Any] = time.perf_counter_ns,
        seconds: Callable[[Any, Any], float] = _seconds_of_ns,
        now_ns: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        self._mark, self._seconds = mark, seconds
        self._marks: list[tuple[Instruction, Any, Any, Any]] = []
        self._origin_ns = now_ns()
        self._origin = self._begun = self._arrived = mark()
        self._instruction = Instruction(Kind.REDUCE_GRADIENTS)

    def begin(self, instruction: Instruction) -> None:
        self._instruction = instruction
        self._begun = self._arrived = self._mark()

    def arrived(self) -> None:
        """Everything from ``begin`` to here was waiting."""
        self._arrived = self._mark()

    def end(self) -> None:
        self._marks.append((self._instruction, self._begun, self._arrived, self._mark()))

    def record(self) -> RankRecord:
        """What was taken down; on a device, after it has finished the step."""
        spans = []
        for instruction, begun, arrived, ended in self._marks:
            start = self._seconds(self._origin, begun)
            waited = 0.0 if arrived is begun else self._seconds(begun, arrived)
            spans.append(Span(instruction, start, self._seconds(self._origin, ended), waited))
        return RankRecord(self._origin_ns, tuple(spans))


@dataclass(frozen=True)
class RankRecord:
    """What one rank recorded. origin_ns: its own clock when its spans' time was 0."""

    origin_ns: int
    spans: tuple[Span, ...]


def clock_offset_ns(round_trips: Sequence[tuple[int, int, int]]) -> int:
    """How far another rank's clock is ahead of this one's, nanoseconds.

    round_trips: (this clock when it asked, the other clock when it answered, this clock when the answer was there). The
    fastest one tells most: the answer was given half-way, give or take half of its time (Cristian 1989).
    """
    asked, answered, back = min(round_trips, key=lambda trip: trip[2] - trip[0])
    return answered - (asked + back) // 2


def merged(
    schedule: Schedule,
    step: int,
    chunk_layers: tuple[int, ...],
    records: Sequence[RankRecord],
    offsets_ns: Sequence[int],
) -> Timeline:
    """One timeline of all pipeline ranks' records, by the clock of rank 0; it begins at 0.

    offsets_ns: how far each rank's clock is ahead of that of rank 0 (`clock_offset_ns`).
    """
    origins = [record.origin_ns - offset for record, offset in zip(records, offsets_ns, strict=True)]
    moved = [_moved(record.spans, (origin - origins[0]) * NS) for record, origin in zip(records, origins, strict=True)]
    timeline = Timeline(schedule.name, schedule.placement, schedule.num_microbatches, tuple(moved), step, chunk_layers)
    return replace(timeline, ranks=tuple(_moved(spans, -timeline.begin) for spans in moved))


def _moved(spans: Sequence[Span], by: float) -> tuple[Span, ...]:
    return tuple(span._replace(start=span.start + by, end=span.end + by) for span in spans)


def write_timeline(path: Path, timeline: Timeline) -> None:
    """Writes JSON with one rank a line. Raises DataError."""
    head = {
        "schedule": timeline.schedule,
        "step": timeline.step,
        "microbatches": timeline.num_microbatches,
        "rank_of_chunk": timeline.placement.rank_of,
        "chunk_layers": timeline.chunk_layers,
        "unit": "seconds",
        "span": ["kind", "chunk", "microbatch", "start", "end", "waited"],
    }
    ranks = ",\n".join(json.dumps(_rows(spans), separators=(",", ":")) for spans in timeline.ranks)
    with AtomicFile(path) as file:
        file.write(f'{json.dumps(head)[:-1]}, "ranks": [\n{ranks}\n]}}\n'.encode())


def read_timeline(path: Path) -> Timeline:
    """Raises DataError for a file that is not there, or is none of `write_timeline`."""
    try:
        fields = json.loads(path.read_bytes())
        placement = Placement(tuple(map(int, fields["rank_of_chunk"])))
        ranks = tuple(_spans(rows) for rows in fields["ranks"])
        chunk_layers = tuple(map(int, fields["chunk_layers"]))
        timeline = Timeline(
            str(fields["schedule"]), placement, int(fields["microbatches"]), ranks, fields["step"], chunk_layers
        )
        if placement.num_ranks != len(ranks) or not all(ranks) or len(chunk_layers) != placement.num_chunks:
            raise ValueError("a rank without spans, or a chunk without layers")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise DataError(f"{path}: is no record of a pipeline's step; remove it, and record a step again") from None
    return timeline


def _rows(spans: Sequence[Span]) -> list[list[Any]]:
    """Times to the nanosecond."""
    times = ((span.start, span.end, span.waited) for span in spans)
    return [
        [span.instruction.kind.value, span.instruction.chunk, span.instruction.microbatch]
        + [round(float(value), 9) for value in row]
        for span, row in zip(spans, times, strict=True)
    ]


def _spans(rows: Sequence[Sequence[Any]]) -> tuple[Span, ...]:
    """Raises ValueError for times that cannot be."""
    spans = []
    for kind, chunk, microbatch, start, end, waited in rows:
        if not (0 <= waited <= end - start + 2 * NS and end < float("inf")):
            raise ValueError(f"from {start} to {end}, {waited} of it waiting")
        spans.append(Span(Instruction(Kind(kind), int(chunk), int(microbatch)), start, end, waited))
    return tuple(spans)
