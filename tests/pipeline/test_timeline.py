"""Recording: what is taken down, what it costs, how ranks' clocks are brought together, what is on the disk."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.pipeline.instructions import Instruction, Kind
from megatron_lite.pipeline.schedules import make_schedule
from megatron_lite.pipeline.simulate import Costs, Links, simulate
from megatron_lite.pipeline.timeline import (
    RankRecord,
    Recorder,
    Span,
    Timeline,
    clock_offset_ns,
    merged,
    read_timeline,
    write_timeline,
)
from megatron_lite.utils.files import DataError

MS = 1_000_000


@dataclass
class Clock:
    """A clock that stands where it is put. ahead: of that of rank 0, nanoseconds."""

    ahead: int = 0
    now: int = 0

    def __call__(self) -> int:
        return self.now + self.ahead


def recorded(timeline: Timeline, rank: int, clock: Clock) -> RankRecord:
    """What a recorder takes down of a rank that runs like in the timeline, whose times are milliseconds."""
    clock.now = 7 * MS * rank  # ranks begin at different times
    recorder = Recorder(mark=clock, now_ns=clock)
    for span in timeline.ranks[rank]:
        clock.now = round(span.start * MS)
        recorder.begin(span.instruction)
        if span.waited:
            clock.now = round(span.began * MS)
            recorder.arrived()
        clock.now = round(span.end * MS)
        recorder.end()
    return recorder.record()


@pytest.mark.parametrize("ahead", [(0, 0, 0), (0, -5_000, 3_000_000_000_000)])
def test_all_ranks_records_make_the_timeline_that_was(ahead: tuple[int, ...]) -> None:
    schedule = make_schedule("1f1b", 3, 1, 4)
    timeline = simulate(schedule, Costs.unit(), Links(latency_s=2))
    records = [recorded(timeline, rank, Clock(ahead[rank])) for rank in range(3)]

    found = merged(schedule, 5, (1, 1, 1), records, ahead)
    assert (found.schedule, found.placement, found.num_microbatches, found.step) == ("1f1b", schedule.placement, 4, 5)
    assert found.as_schedule() == schedule
    for spans, expected in zip(found.ranks, timeline.ranks, strict=True):
        for span, wanted in zip(spans, expected, strict=True):
            assert span.instruction == wanted.instruction
            times = [1e3 * value for value in span[1:]]
            assert times == pytest.approx(list(wanted[1:]), abs=1e-6)
    if any(ahead):
        wrong = merged(schedule, 5, (1, 1, 1), records, (0, 0, 0))
        assert wrong.makespan > 100 * found.makespan, "negative control: clocks that are not aligned"


def test_the_fastest_round_trip_tells_the_offset() -> None:
    """The other clock is 1,000 ahead; one answer was held up on its way back, one on its way there."""
    trips = [(0, 1_010, 500), (600, 1_620, 640), (700, 2_090, 1_120)]
    assert clock_offset_ns(trips) == 1_000
    assert clock_offset_ns(trips[:1]) == 760, "negative control: half of a slow round trip"


class Event:
    """A mark that says its time only when the step is over, as those of a GPU."""

    def __init__(self, clock: Clock) -> None:
        self.time = clock()


def test_marks_are_read_when_the_step_is_over() -> None:
    clock = Clock()
    marks: list[Event] = []
    read = []

    def mark() -> Event:
        marks.append(Event(clock))
        return marks[-1]

    def seconds(first: Event, last: Event) -> float:
        read.append(last)
        return (last.time - first.time) / 1e9

    recorder = Recorder(mark, seconds, clock)
    clock.now = MS
    recorder.begin(Instruction(Kind.FORWARD, 0, 0))
    clock.now = 3 * MS
    recorder.end()
    assert not read and len(marks) == 3
    (span,) = recorder.record().spans
    assert span == Span(Instruction(Kind.FORWARD, 0, 0), 1e-3, 3e-3, 0.0)


def test_recording_costs_little() -> None:
    """Under 1 % of a step: 20 microseconds an instruction would be that of one that takes 2 ms. The fastest of several
    goes, on a machine that does other things too; it is about half a microsecond."""
    instruction, count, best = Instruction(Kind.FORWARD, 0, 0), 2_000, float("inf")
    for _ in range(10):
        recorder = Recorder()
        begin = time.perf_counter_ns()
        for _ in range(count):
            recorder.begin(instruction)
            recorder.arrived()
            recorder.end()
        best = min(best, (time.perf_counter_ns() - begin) / count)
    assert len(recorder.record().spans) == count
    assert best < 20_000, f"{best:.0f} ns an instruction"


def test_a_timeline_comes_back_from_the_disk(tmp_path: Path) -> None:
    schedule = make_schedule("gpipe", 4, 1, 6)
    costs = Costs({Kind.FORWARD: 0.25, Kind.BACKWARD: 0.5})
    timeline = replace(simulate(schedule, costs, Links(0.125)), step=3, chunk_layers=(2, 1, 1, 2))
    path = tmp_path / "pipeline.json"
    write_timeline(path, timeline)
    assert read_timeline(path) == timeline
    assert len(path.read_text().splitlines()) == 6, "a line for each rank, between a first and a last one"
    json.loads(path.read_bytes())


def drop(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda fields: fields.pop(key)


def change(place: int, value: Any) -> Callable[[dict[str, Any]], None]:
    def changed(fields: dict[str, Any]) -> None:
        fields["ranks"][1][2][place] = value

    return changed


BROKEN = [
    *map(drop, ("schedule", "step", "microbatches", "rank_of_chunk", "chunk_layers", "ranks")),
    change(0, "sideways"), change(1, "x"), change(3, "x"), change(3, 1e9), change(4, float("nan")),
    change(5, -1.0), change(5, 99.0),
    lambda fields: fields["ranks"].pop(), lambda fields: fields["ranks"][0].clear(),
    lambda fields: fields["ranks"][0][0].pop(), lambda fields: fields.update(rank_of_chunk=[]),
]  # fmt: skip


@pytest.mark.parametrize("place", range(len(BROKEN)))
def test_a_broken_record_is_named(tmp_path: Path, place: int) -> None:
    path = tmp_path / "pipeline.json"
    write_timeline(path, replace(simulate(make_schedule("1f1b", 2, 1, 2), Costs.unit()), step=3, chunk_layers=(1, 1)))
    read_timeline(path)
    fields = json.loads(path.read_bytes())
    BROKEN[place](fields)
    path.write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(DataError, match=r"pipeline\.json: is no record of a pipeline's step; remove it"):
        read_timeline(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.json"
    for content in (b"", b"[]", b"\xff", b"[" * 100_000, b'{"ranks": 3}'):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is no record"):
            read_timeline(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_timeline(tmp_path / "nowhere.json")
