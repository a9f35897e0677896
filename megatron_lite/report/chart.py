"""Line charts as one self-contained SVG file, readable on light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

WIDTH, MARGIN_LEFT, MARGIN_RIGHT, TOP, PANEL_GAP, BOTTOM = 880, 64, 140, 102, 46, 44
MAX_POINTS = 1200  # more than there are pixels: a longer line is thinned
SMOOTHED_SHARE = 0.03  # window of the smoothed line, as a share of the steps
_STYLE = """
  text { font: 12px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #57606a }
  .page { fill: #ffffff } .title { font-size: 18px; font-weight: 650; fill: #1f2328 }
  .heading { font-weight: 600; fill: #1f2328 } .grid { stroke: #d8dee4; stroke-width: 1 }
  .axis { stroke: #afb8c1; stroke-width: 1 } .line { fill: none; stroke-width: 2; stroke-linejoin: round }
  .faint { opacity: .4; stroke-width: 1 } .c0 { stroke: #0969da } .c1 { stroke: #bc4c00 }
  .f0 { fill: #0969da } .f1 { fill: #bc4c00 } .label { font-weight: 600 }
  .dot { stroke: #ffffff; stroke-width: 1.5 }
  @media (prefers-color-scheme: dark) {
    text { fill: #9198a1 } .page { fill: #0d1117 } .title, .heading { fill: #f0f6fc } .grid { stroke: #262c36 }
    .axis { stroke: #3d444d } .c0 { stroke: #58a6ff } .c1 { stroke: #ffa657 } .f0 { fill: #58a6ff }
    .f1 { fill: #ffa657 } .dot { stroke: #0d1117 }
  }
"""


@dataclass(frozen=True)
class Line:
    """Points (x, y) in order of x. smooth: drawn faint, under its moving average. marked: with a dot at each point."""

    name: str
    points: Sequence[Point]
    smooth: bool = False
    marked: bool = False


@dataclass(frozen=True)
class Panel:
    """One chart. height: of the plotting area, pixels. from_zero: the y axis begins at 0."""

    title: str
    lines: Sequence[Line]
    height: int
    from_zero: bool = False


@dataclass(frozen=True)
class _Scale:
    """From values to pixels, linear; ``ticks`` are round numbers inside."""

    low: float
    high: float
    first: float
    last: float
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        return self.first + (value - self.low) / (self.high - self.low) * (self.last - self.first)


def draw(title: str, subtitle: str, panels: Sequence[Panel]) -> str:
    """The SVG text: panels one below the other, with one x axis of steps."""
    steps = [x for panel in panels for line in panel.lines for x, _ in line.points]
    right = WIDTH - MARGIN_RIGHT
    low, high = min(steps), max(steps)
    across = _Scale(low, max(high, low + 1), MARGIN_LEFT, right, _ticks(low, max(high, low + 1), 8, whole=True))
    height = TOP + sum(panel.height for panel in panels) + PANEL_GAP * (len(panels) - 1) + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{height}" rx="8"/>',
        f'<text class="title" x="{MARGIN_LEFT - 40}" y="34">{escape(title)}</text>',
        f'<text x="{MARGIN_LEFT - 40}" y="54">{escape(subtitle)}</text>',
    ]
    top = TOP
    for panel in panels:
        parts += _panel(panel, across, top, is_last=panel is panels[-1])
        top += panel.height + PANEL_GAP
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, across: _Scale, top: int, *, is_last: bool) -> list[str]:
    values = [y for line in panel.lines for _, y in line.points if math.isfinite(y)] or [0.0]
    low, high = (0.0 if panel.from_zero else min(values)), max(values)
    low, high = (low, high) if high > low else (low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1))
    room = 0.04 * (high - low)
    low, high = (low if panel.from_zero else low - room), high + room
    bottom = top + panel.height
    up = _Scale(low, high, bottom, top, _ticks(low, high, max(3, panel.height // 48)))
    parts = [f'<text class="heading" x="{MARGIN_LEFT - 40}" y="{top - 10}">{escape(panel.title)}</text>']
    for tick in up.ticks:
        y = f"{up(tick):.1f}"
        parts.append(f'<line class="grid" x1="{across.first}" x2="{across.last}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{across.first - 8}" y="{up(tick) + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    parts.append(f'<line class="axis" x1="{across.first}" x2="{across.last}" y1="{bottom}" y2="{bottom}"/>')
    for tick in across.ticks if is_last else ():
        parts.append(f'<text x="{across(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{_number(tick)}</text>')
    if is_last:
        parts.append(f'<text x="{across.last + 24}" y="{bottom + 18}">step</text>')
    ends = []
    for colour, line in enumerate(panel.lines):
        points = [point for point in line.points if math.isfinite(point[1])]
        if points:
            parts += _line(line, points, colour, across, up)
            shown = _smoothed(points) if line.smooth else points
            ends.append((up(shown[-1][1]), colour, f"{line.name} {_number(shown[-1][1])}".strip()))
    return parts + _end_labels(ends, across.last + 10)


def _line(line: Line, points: Sequence[Point], colour: int, across: _Scale, up: _Scale) -> list[str]:
    parts = []
    if line.smooth:
        parts.append(f'<path class="line faint c{colour}" d="{_path(points, across, up)}"/>')
    shown = _smoothed(points) if line.smooth else points
    parts.append(f'<path class="line c{colour}" d="{_path(shown, across, up)}"/>')
    if line.marked:
        parts += [f'<circle class="dot f{colour}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="4"/>' for x, y in points]
    return parts


def _path(points: Sequence[Point], across: _Scale, up: _Scale) -> str:
    stride = -(-len(points) // MAX_POINTS)
    kept = [*points[:-1:stride], points[-1]]
    return "M" + "L".join(f"{across(x):.1f},{up(y):.1f}" for x, y in kept)


def _smoothed(points: Sequence[Point]) -> list[Point]:
    """Moving average around each point. The window shrinks towards the first point, so that the line begins where the
    points do, and is cut off at the last one, so that the line does not end on the noise of one step."""
    half = max(1, round(len(points) * SMOOTHED_SHARE / 2)) if len(points) > 2 else 0
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    result = []
    for i, (x, _) in enumerate(points):
        first, stop = i - min(half, i), min(i + min(half, i) + 1, len(points))
        result.append((x, (sums[stop] - sums[first]) / (stop - first)))
    return result


def _end_labels(ends: list[tuple[float, int, str]], x: float) -> list[str]:
    """The value at the end of each line, beside it; labels that would overlap are moved apart."""
    parts, lowest = [], -math.inf
    for y, colour, text in sorted(ends):
        lowest = max(y, lowest + 16)
        parts.append(f'<text class="label f{colour}" x="{x}" y="{lowest + 4:.1f}">{escape(text)}</text>')
    return parts


def _ticks(low: float, high: float, count: int, *, whole: bool = False) -> tuple[float, ...]:
    """At most about ``count`` round numbers from ``low`` to ``high``."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    if whole:
        step = max(1.0, step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(round(i * step, 12) for i in range(first, last + 1))


def _number(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e6:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"
