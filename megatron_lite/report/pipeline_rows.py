"""A timeline as rows of boxes, few enough to be drawn: what each rank does, and why it does nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from megatron_lite.pipeline.idle import Cause, idle_times
from megatron_lite.pipeline.instructions import RECEIVES, SENDS, Kind
from megatron_lite.pipeline.timeline import Timeline

SHADES = 4  # of a kind, by which of the rank's chunks it works for; a fifth chunk looks like the first
STRETCH = 8  # boxes that are too short are drawn together over so many times the length of the shortest one drawn


class Box(NamedTuple):
    """start, end: seconds from the timeline's beginning. what: the kind of work, or why there is none. top, bottom:
    the part of the row's height, from 0 to 1, where several boxes stand for one stretch of time."""

    start: float
    end: float
    what: Kind | Cause
    shade: int = 0
    text: str = ""
    top: float = 0
    bottom: float = 1


def picked(num_rows: int, most: int) -> list[int]:
    """At most so many rows, evenly spread, the first and the last among them."""
    if num_rows <= most:
        return list(range(num_rows))
    return sorted({round(place * (num_rows - 1) / (most - 1)) for place in range(most)})


def rows_of(timeline: Timeline, shortest: float = 0) -> list[list[Box]]:
    """The boxes of each rank, in order. shortest: seconds; neighbours that all are shorter become a stack, in which
    heights are shares of the time. 0 leaves all boxes apart."""
    rows = (_boxes(timeline, rank, idle) for rank, idle in enumerate(idle_times(timeline)))
    invisible = shortest / 1000  # such as what the disk's rounding of times leaves between two of them
    return [_joined([box for box in row if box.end - box.start > invisible], shortest) for row in rows]


def _boxes(timeline: Timeline, rank: int, idle: Iterable[tuple[float, float, Cause]]) -> list[Box]:
    begin, chunks = timeline.begin, timeline.placement.chunks_of(rank)
    boxes = [Box(float(start - begin), float(end - begin), cause) for start, end, cause in idle]
    for span in timeline.ranks[rank]:
        kind, chunk, microbatch = span.instruction
        if kind not in SENDS | RECEIVES and span.end > span.began:
            shade = chunks.index(chunk) % SHADES if chunk in chunks else 0
            text = str(microbatch) if microbatch >= 0 else ""
            boxes.append(Box(float(span.began - begin), float(span.end - begin), kind, shade, text))
    return sorted(boxes, key=lambda box: box.start)


def _joined(boxes: Sequence[Box], shortest: float) -> list[Box]:
    """Work of one kind, or idle time, that is long enough as a whole keeps its edges; what is shorter is mixed."""
    result: list[Box] = []
    mixed: list[Box] = []
    for _, group in groupby(boxes, key=lambda box: None if isinstance(box.what, Cause) else (box.what, box.shade)):
        alike = list(group)
        if alike[-1].end - alike[0].start < shortest:
            mixed += alike
            continue
        result += [*_stacked(mixed, shortest), *_stacked(alike, shortest)]
        mixed = []
    return [*result, *_stacked(mixed, shortest)]


def _stacked(boxes: Sequence[Box], shortest: float) -> Iterator[Box]:
    run: list[Box] = []
    for box in boxes:
        if box.end - box.start >= shortest:
            yield from _together(run)
            yield box
            run = []
            continue
        run.append(box)
        if box.end - run[0].start >= STRETCH * shortest:
            yield from _together(run)
            run = []
    yield from _together(run)


def _together(run: Sequence[Box]) -> Iterator[Box]:
    """Neighbours as a stack: work above, idle time below."""
    if len(run) < 2:
        yield from run
        return
    times: dict[tuple[Kind | Cause, int], float] = {}
    for box in run:
        times[box.what, box.shade] = times.get((box.what, box.shade), 0) + box.end - box.start
    order = {what: place for place, what in enumerate((*Kind, *Cause))}
    start, end, top = run[0].start, run[-1].end, 0.0
    for (what, shade), time in sorted(times.items(), key=lambda one: (order[one[0][0]], one[0][1])):
        bottom = top + time / (end - start)
        yield Box(start, end, what, shade, top=top, bottom=bottom)
        top = bottom
