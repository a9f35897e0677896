"""Timelines as a picture in SVG, one below the other on one time scale: a row a rank, boxes for work, else hatching.

It needs no script and no reference (``url(...)``): a page that forbids itself to load anything can hold it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from megatron_lite.pipeline.idle import Cause
from megatron_lite.pipeline.instructions import Kind
from megatron_lite.pipeline.timeline import Timeline
from megatron_lite.report.pipeline_rows import Box, picked, rows_of
from megatron_lite.report.series import number, ticks

WIDTH, MARGIN, RIGHT, HEADING, AXIS = 1096, 62, 10, 34, 26
ACROSS = WIDTH - MARGIN - RIGHT
MAX_ROWS = 16
SHORTEST = 5  # pixels; neighbouring boxes that are all narrower are drawn as a stack
THIN = 4  # pixels; what is lower, or half as wide, has a line through it for a hatching
LEAST_HATCHED = 0.7  # pixels; a line, which is one wide, would make more of what is narrower
DIGIT = 7  # pixels
UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))
KIND_CLASSES = {
    Kind.FORWARD: "f",
    Kind.BACKWARD: "b",
    Kind.BACKWARD_INPUT: "i",
    Kind.BACKWARD_WEIGHT: "w",
    Kind.GATHER_PARAMETERS: "g",
    Kind.RELEASE_PARAMETERS: "g",
    Kind.START_REDUCTION: "s",
    Kind.REDUCE_GRADIENTS: "r",
}
CAUSE_CLASSES = {
    Cause.RAMP: "ramp",
    Cause.IMBALANCE: "imbalance",
    Cause.COMMUNICATION: "communication",
    Cause.HOST: "host",
}
# (direction, pixels from line to line) of the hatching
HATCHES = {Cause.RAMP: (1, 8), Cause.IMBALANCE: (-1, 5), Cause.COMMUNICATION: (1, 4)}
# The numbers in the boxes are read on all shades of a kind.
STYLE = """
  .pl-f0 { fill: #0969da } .pl-f1 { fill: #0550ae } .pl-f2 { fill: #033d8b } .pl-f3 { fill: #0a3069 }
  .pl-b0 { fill: #1a7f37 } .pl-b1 { fill: #116329 } .pl-b2 { fill: #044f1e } .pl-b3 { fill: #003d16 }
  .pl-i0 { fill: #0b7285 } .pl-i1 { fill: #095c6b } .pl-i2 { fill: #074854 } .pl-i3 { fill: #05363f }
  .pl-w0 { fill: #8250df } .pl-w1 { fill: #6639ba } .pl-w2 { fill: #512a97 } .pl-w3 { fill: #3e1f79 }
  .pl-g0 { fill: #9a6700 } .pl-g1 { fill: #7d4e00 } .pl-g2 { fill: #633c01 } .pl-g3 { fill: #4d2d00 }
  .pl-s0 { fill: #bf3989 } .pl-s1 { fill: #99286e } .pl-s2 { fill: #772057 } .pl-s3 { fill: #611347 }
  .pl-r0 { fill: #57606a }
  .pl-ramp { fill: #f0f3f6 } .pl-imbalance { fill: #fff3d1 } .pl-communication { fill: #ffe5e2 }
  .pl-host { fill: #d8dee4 }
  .pl-line { fill: none; stroke-width: 1 } .pl-line.ramp { stroke: #b3bcc6 }
  .pl-line.imbalance { stroke: #c98a00 } .pl-line.communication { stroke: #cf222e }
  .pl-n text { font-size: 11px; fill: #ffffff; text-anchor: middle; font-weight: 550 }
"""
DARK_STYLE = """
    .pl-f0 { fill: #58a6ff } .pl-f1 { fill: #79c0ff } .pl-f2 { fill: #a5d6ff } .pl-f3 { fill: #cae8ff }
    .pl-b0 { fill: #3fb950 } .pl-b1 { fill: #56d364 } .pl-b2 { fill: #7ee787 } .pl-b3 { fill: #aff5b4 }
    .pl-i0 { fill: #39b7c9 } .pl-i1 { fill: #63cbd9 } .pl-i2 { fill: #8fdde7 } .pl-i3 { fill: #bcecf2 }
    .pl-w0 { fill: #bc8cff } .pl-w1 { fill: #d2a8ff } .pl-w2 { fill: #e2c5ff } .pl-w3 { fill: #f0defd }
    .pl-g0 { fill: #d29922 } .pl-g1 { fill: #e3b341 } .pl-g2 { fill: #f2cc60 } .pl-g3 { fill: #f8e3a1 }
    .pl-s0 { fill: #db61a2 } .pl-s1 { fill: #f778ba } .pl-s2 { fill: #ff9bce } .pl-s3 { fill: #ffbedd }
    .pl-r0 { fill: #9198a1 }
    .pl-ramp { fill: #161b22 } .pl-imbalance { fill: #2b2210 } .pl-communication { fill: #2d1517 }
    .pl-host { fill: #30363d }
    .pl-line.ramp { stroke: #4a525c } .pl-line.imbalance { stroke: #bb8009 }
    .pl-line.communication { stroke: #f85149 } .pl-n text { fill: #0d1117 }
"""


def picture(timelines: Sequence[tuple[str, Timeline]], description: str) -> str:
    """An ``<svg>`` of named timelines. description: in words, for those who cannot see it."""
    longest = max(float(timeline.makespan) for _, timeline in timelines)
    across = ACROSS / longest
    unit, size = next((unit for unit in UNITS if longest >= unit[1]), UNITS[-1])
    marks = ticks(0, longest / size, 10)
    parts: list[str] = []
    top = 0
    for name, timeline in timelines:
        drawn = _rows(name, timeline, across, top + HEADING)
        height = len(picked(len(timeline.ranks), MAX_ROWS)) * _pitch(len(timeline.ranks))
        for mark in marks:
            x = MARGIN + mark * size * across
            parts.append(f'<path class="grid" d="M{x:.1f} {top + HEADING - 6}v{height + 6}"/>')
        parts += drawn
        top += HEADING + height
    for mark in marks:
        x = MARGIN + mark * size * across
        parts.append(f'<text x="{x:.1f}" y="{top + 17}" text-anchor="middle">{number(mark)}</text>')
    parts.append(f'<text x="{MARGIN - 8}" y="{top + 17}" text-anchor="end">{unit}</text>')
    frame = f'viewBox="0 0 {WIDTH} {top + AXIS}" role="img" aria-label="{escape(description)}"'
    return "\n".join([f"<svg {frame}>", *parts, "</svg>"])


def shortest_drawn(timelines: Sequence[Timeline]) -> float:
    """Seconds below which neighbouring boxes are drawn as a stack."""
    return SHORTEST * max(float(timeline.makespan) for timeline in timelines) / ACROSS


def swatch(what: Kind | Cause) -> str:
    """The look of a kind of box, for a legend."""
    box = Box(0, 24, what)
    shapes = _shapes([(box, 0)], 1, 14, left=0)
    return f'<svg width="24" height="14" aria-hidden="true">{"".join(shapes)}</svg>'


def _pitch(num_ranks: int) -> int:
    """Pixels from one row to the next."""
    return 32 if num_ranks <= 4 else 26 if num_ranks <= 8 else 20


def _rows(name: str, timeline: Timeline, across: float, top: int) -> Iterator[str]:
    """The boxes of the rows that are drawn, by class, with their labels. across: pixels for a second."""
    rows, shown = rows_of(timeline, SHORTEST / across), picked(len(timeline.ranks), MAX_ROWS)
    pitch = _pitch(len(timeline.ranks))
    height = pitch - 4
    yield f'<text class="heading" x="0" y="{top - 12}">{escape(name)}</text>'
    placed = [(box, top + place * pitch) for place, rank in enumerate(shown) for box in rows[rank]]
    yield from _shapes(placed, across, height, left=MARGIN)
    numbers = [
        f'<text x="{MARGIN + (box.start + box.end) / 2 * across:.1f}" y="{y + height / 2 + 4:.0f}">{box.text}</text>'
        for box, y in placed
        if box.text and (box.end - box.start) * across >= DIGIT * len(box.text) + 4
    ]
    yield f'<g class="pl-n">{"".join(numbers)}</g>'
    for place, rank in enumerate(shown):
        y = top + place * pitch + height / 2 + 4
        yield f'<text x="{MARGIN - 8}" y="{y:.0f}" text-anchor="end">rank {rank}</text>'


def _shapes(placed: Sequence[tuple[Box, int]], across: float, height: int, left: int) -> Iterator[str]:
    """One path for all boxes that look alike, and one for each hatching."""
    paths: dict[str, list[str]] = {}
    for box, y in placed:
        x, width = left + box.start * across, (box.end - box.start) * across
        upper, lower = y + box.top * height, y + box.bottom * height
        gap = 1 if isinstance(box.what, Kind) and box.text and width >= SHORTEST else 0  # neighbours are told apart
        shape = f"M{x:.1f} {upper:.4g}h{max(width - gap, 0.5):.1f}V{lower:.4g}H{x:.1f}z"
        paths.setdefault(f"pl-{_look(box)}", []).append(shape)
        if isinstance(box.what, Cause) and box.what in HATCHES and width > LEAST_HATCHED:
            direction, apart = HATCHES[box.what]
            hatch = _hatch(x, upper, x + width, lower, direction, apart)
            paths.setdefault(f"pl-line {CAUSE_CLASSES[box.what]}", []).append(hatch)
    # Hatching is drawn over what it lies on.
    for name, shapes in sorted(paths.items(), key=lambda path: path[0].startswith("pl-line")):
        yield f'<path class="{name}" d="{"".join(shapes)}"/>'


def _look(box: Box) -> str:
    if isinstance(box.what, Cause):
        return CAUSE_CLASSES[box.what]
    return f"{KIND_CLASSES[box.what]}{box.shade}"


def _hatch(left: float, top: float, right: float, bottom: float, direction: int, apart: int) -> str:
    """Lines at 45 degrees across a box: x + direction * y is a multiple of ``apart`` on each, in all boxes alike."""
    if bottom - top < THIN:
        return f"M{left:.1f} {(top + bottom) / 2:.1f}h{right - left:.1f}"
    if right - left < THIN / 2:
        return f"M{(left + right) / 2:.1f} {top:.4g}V{bottom:.4g}"
    low = left + min(direction * top, direction * bottom)
    high = right + max(direction * top, direction * bottom)
    lines = []
    for step in range(math.ceil(low / apart), math.floor(high / apart) + 1):
        at = step * apart
        ends = sorted((direction * (at - left), direction * (at - right)))
        y0, y1 = max(top, ends[0]), min(bottom, ends[1])
        if y1 > y0:
            lines.append(f"M{at - direction * y0:.1f} {y0:.4g}l{direction * (y0 - y1):.3g} {y1 - y0:.3g}")
    return "".join(lines)
