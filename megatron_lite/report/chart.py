"""Line charts in SVG, readable on light and dark pages: for a picture of its own, or for a page around them.

A plot is an ``<svg>`` of any width: the curves stretch with it, labels and strokes keep their size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape

from megatron_lite.report.series import Point, is_drawable, log_ticks, number, smoothed, thinned, ticks

WIDTH, MARGIN_LEFT, MARGIN_RIGHT, TOP, PANEL_GAP, BOTTOM = 880, 64, 140, 102, 46, 44
ACROSS = 1000  # width of the curves' own coordinates, whatever the plot's width
MAX_DOTS = 120  # a line with more points than that is not marked
TICK_HEIGHT = 40  # about so many pixels from one label of the y axis to the next
STYLE = """
  text { font: 12px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #57606a }
  .page { fill: #ffffff } .title { font-size: 18px; font-weight: 650; fill: #1f2328 }
  .heading { font-weight: 600; fill: #1f2328 } .grid { stroke: #d8dee4; stroke-width: 1 }
  .axis { stroke: #afb8c1; stroke-width: 1 }
  .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round }
  .faint { opacity: .4; stroke-width: 1 } .c0 { stroke: #0969da } .c1 { stroke: #bc4c00 }
  .f0 { fill: #0969da } .f1 { fill: #bc4c00 } .label { font-weight: 600 }
  .dot { stroke: #ffffff; stroke-width: 1.5 } .bad { fill: #cf222e }
  .mark { stroke: #8250df; stroke-width: 1; stroke-dasharray: 2 3 } .mark-label { fill: #8250df; font-size: 11px }
  .limit { stroke: #6e7781; stroke-width: 1; stroke-dasharray: 5 4 } .limit-label { font-size: 11px }
"""
DARK_STYLE = """
    text { fill: #9198a1 } .page { fill: #0d1117 } .title, .heading { fill: #f0f6fc } .grid { stroke: #262c36 }
    .axis { stroke: #3d444d } .c0 { stroke: #58a6ff } .c1 { stroke: #ffa657 } .f0 { fill: #58a6ff }
    .f1 { fill: #ffa657 } .dot { stroke: #0d1117 } .bad { fill: #ff7b72 } .mark { stroke: #bc8cff }
    .mark-label { fill: #bc8cff } .limit { stroke: #9198a1 }
"""


@dataclass(frozen=True)
class Line:
    """Points (x, y) in order of x. smooth: drawn faint, under its moving average. marked: with a dot at each point."""

    name: str
    points: Sequence[Point]
    smooth: bool = False
    marked: bool = False

    @cached_property
    def drawable(self) -> list[Point]:
        return [point for point in self.points if is_drawable(point[1])]

    @cached_property
    def shown(self) -> list[Point]:
        """The points of the line itself: the moving average, or those that are drawable."""
        return smoothed(self.drawable) if self.smooth else self.drawable


@dataclass(frozen=True)
class Panel:
    """One chart. height: of the plotting area, pixels. from_zero: the y axis begins at 0. limit: a name and the value
    at which a horizontal line is drawn, if it is within the axis. marks: (x, name) of vertical lines."""

    title: str
    lines: Sequence[Line]
    height: int
    from_zero: bool = False
    limit: tuple[str, float] | None = None
    marks: Sequence[tuple[float, str]] = field(default=())


@dataclass(frozen=True)
class Scale:
    """From values to a share of the way from ``low`` to ``high``; ``ticks`` are round numbers inside."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def step_range(panels: Sequence[Panel]) -> tuple[float, float]:
    """The first and the last step of all lines."""
    lines = [line for panel in panels for line in panel.lines if line.points]
    return min(line.points[0][0] for line in lines), max(line.points[-1][0] for line in lines)


def step_scale(panels: Sequence[Panel], most_ticks: int) -> Scale:
    """The x axis that all panels share."""
    low, high = step_range(panels)
    high = max(high, low + 1)
    return Scale(low, high, ticks(low, high, most_ticks, whole=True))


def value_scale(panel: Panel, *, log: bool = False) -> Scale | None:
    """The y axis of a panel; None where a logarithmic one has fewer than two different values to show."""
    values = [y for line in panel.lines for _, y in line.drawable if y > 0 or not log]
    most = max(3, round(panel.height / TICK_HEIGHT))
    if log:
        if not values or min(values) == max(values):
            return None
        low, high = min(values), max(values)
        room = (high / low) ** 0.04
        return Scale(low / room, high * room, log_ticks(low / room, high * room, most), log=True)
    low, high = min(values, default=0.0), max(values, default=0.0)
    if panel.from_zero:
        low = min(low, 0.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        half = 0.5 * abs(low) if abs(low) > 1 / ACROSS**3 else 0.5
        low, high = low - half, high + half
    room = 0.04 * (high - low)
    low, high = (0.0 if panel.from_zero and low == 0 else low - room), high + room
    return Scale(low, high, ticks(low, high, most))


def draw(title: str, subtitle: str, panels: Sequence[Panel]) -> str:
    """A picture, as the text of an SVG file: panels one below the other, with one x axis of steps."""
    across, right = step_scale(panels, 8), WIDTH - MARGIN_RIGHT
    height = TOP + sum(panel.height for panel in panels) + PANEL_GAP * (len(panels) - 1) + BOTTOM
    style = f"{STYLE}  @media (prefers-color-scheme: dark) {{{DARK_STYLE}  }}\n"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">',
        f"<style>{style}</style>",
        f'<rect class="page" width="{WIDTH}" height="{height}" rx="8"/>',
        f'<text class="title" x="{MARGIN_LEFT - 40}" y="34">{escape(title)}</text>',
        f'<text x="{MARGIN_LEFT - 40}" y="54">{escape(subtitle)}</text>',
    ]
    top = TOP
    for panel in panels:
        is_last, up = panel is panels[-1], value_scale(panel)
        assert up is not None, "only a logarithmic axis may be missing"
        place = f'x="{MARGIN_LEFT}" y="{top}" width="{right - MARGIN_LEFT}" height="{panel.height}"'
        parts.append(f'<text class="heading" x="{MARGIN_LEFT - 40}" y="{top - 10}">{escape(panel.title)}</text>')
        parts += plot(panel, across, up, place, steps=is_last, ends=True)
        if is_last:
            parts.append(f'<text x="{right + 24}" y="{top + panel.height + 18}">step</text>')
        top += panel.height + PANEL_GAP
    return "\n".join([*parts, "</svg>", ""])


def plot(
    panel: Panel, across: Scale, up: Scale, attributes: str, *, steps: bool, ends: bool, columns: int = ACROSS
) -> list[str]:
    """A panel without its title: an ``<svg>`` whose box is the plotting area, with its labels outside of the box.

    attributes: of that element, its place and size among them. steps: whether the x axis has labels. ends: whether
    the value at the end of each line stands beside it. columns: of pixels, to which long curves are thinned.
    """
    height = panel.height
    parts = [f'<svg overflow="visible" {attributes}>']
    for tick in up.ticks:
        y = height * (1 - up(tick))
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="-8" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    parts.append(f'<line class="axis" x1="0" x2="100%" y1="{height}" y2="{height}"/>')
    for i, tick in enumerate(across.ticks if steps else ()):
        spare = ' class="spare"' if i % 2 == len(across.ticks) % 2 else ""  # a narrow page leaves it out
        place = f'x="{100 * across(tick):.2f}%" y="{height + 18}"'
        parts.append(f'<text{spare} {place} text-anchor="middle">{number(tick)}</text>')
    parts += _guides(panel, across, up)
    inner = f'viewBox="0 0 {ACROSS} {height}" preserveAspectRatio="none" width="100%" height="{height}"'
    parts.append(f'<svg {inner} overflow="visible">')
    labels, dots = [], []
    for colour, line in enumerate(panel.lines):
        points = [point for point in line.shown if not up.log or point[1] > 0]
        if not points:
            continue
        parts += _curves(line, colour, across, up, height, columns)
        last = points[-1][1]
        labels.append((height * (1 - up(last)), colour, f"{line.name} {number(last)}".strip()))
        if len(points) == 1 or (line.marked and len(points) <= MAX_DOTS):
            dots += [
                f'<circle class="dot f{colour}" cx="{100 * across(x):.2f}%" cy="{height * (1 - up(y)):.1f}" r="4"/>'
                for x, y in points
            ]
    return [*parts, "</svg>", *dots, *_gaps(panel, across), *(_end_labels(labels) if ends else ()), "</svg>"]


def _guides(panel: Panel, across: Scale, up: Scale) -> list[str]:
    """The vertical lines of the marks, and the horizontal one of the limit."""
    parts = []
    for step, name in panel.marks:
        x = f"{100 * across(step):.2f}%"
        parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="0" y2="{panel.height}"/>')
        parts.append(f'<text class="mark-label" x="{x}" y="-4" text-anchor="middle">{escape(name)}</text>')
    if panel.limit is not None and up.low < panel.limit[1] < up.high:
        name, value = panel.limit
        y = panel.height * (1 - up(value))
        parts.append(f'<line class="limit" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
        label = f'<text class="limit-label" x="100%" dx="-4" y="{y - 5:.1f}" text-anchor="end">{escape(name)}</text>'
        parts.append(label)
    return parts


def _curves(line: Line, colour: int, across: Scale, up: Scale, height: int, columns: int) -> list[str]:
    def path(classes: str, points: Sequence[Point]) -> str:
        drawn = _path(thinned(points, columns), across, up, height)
        return f'<path class="line {classes}" vector-effect="non-scaling-stroke" d="{drawn}"/>'

    if not line.smooth:
        return [path(f"c{colour}", line.points)]
    return [path(f"faint c{colour}", line.points), path(f"c{colour}", line.shown)]


def _path(points: Sequence[Point], across: Scale, up: Scale, height: int) -> str:
    """Interrupted where a value is not drawable. A point between two gaps is a dot: a line of no length, round caps."""
    pieces: list[list[str]] = [[]]
    for x, y in points:
        if is_drawable(y) and (y > 0 or not up.log):
            pieces[-1].append(f"{ACROSS * across(x):.1f},{height * (1 - up(y)):.1f}")
        elif pieces[-1]:
            pieces.append([])
    return "".join("M" + "L".join(piece) + ("h0" if len(piece) == 1 else "") for piece in pieces if piece)


def _gaps(panel: Panel, across: Scale) -> list[str]:
    """A red dot at the upper edge for each step, or pixel, without a number."""
    steps = (x for line in panel.lines for x, y in line.points if not is_drawable(y))
    places = dict.fromkeys(f"{100 * across(x):.1f}" for x in steps)
    return [f'<circle class="bad" cx="{place}%" cy="0" r="3"/>' for place in places]


def _end_labels(ends: list[tuple[float, int, str]]) -> list[str]:
    """The value at the end of each line, beside it; labels that would overlap are moved apart."""
    parts, lowest = [], -math.inf
    for y, colour, text in sorted(ends):
        lowest = max(y, lowest + 16)
        parts.append(f'<text class="label f{colour}" x="100%" dx="10" y="{lowest + 4:.1f}">{escape(text)}</text>')
    return parts
