"""Curves as numbers: which points of a long one are drawn, its moving average, round numbers for an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

Point = tuple[float, float]

SMOOTHED_SHARE = 0.03  # window of the moving average, as a share of the steps
# What is larger is no measurement, and would overflow where the height of a chart is computed.
LARGEST = 1e30


def is_drawable(value: float) -> bool:
    """Whether a value has a place on an axis: NaN, infinities and overflowing numbers have none."""
    return -LARGEST < value < LARGEST


def thinned(points: Sequence[Point], columns: int) -> list[Point]:
    """At most ``2 * columns + 2`` of the points (x, y), in order of x: a spike of one step survives.

    In each of ``columns`` equal parts of x the lowest and the highest point stay, and of all points the first and the
    last. A part that holds points, none of which is drawable, keeps one of them: there the line is interrupted.
    """
    if len(points) <= 2 * columns:
        return list(points)
    first, width = points[0][0], (points[-1][0] - points[0][0]) / columns or 1.0
    column_of = [min(int((x - first) / width), columns - 1) for x, _ in points]
    kept: list[Point] = []
    for _, column in groupby(range(len(points)), key=column_of.__getitem__):
        positions = list(column)
        inside = [i for i in positions if is_drawable(points[i][1])] or positions[:1]
        ends = {min(inside, key=lambda i: points[i][1]), max(inside, key=lambda i: points[i][1])}
        kept += [points[i] for i in sorted(ends)]
    return [*([] if kept[0] == points[0] else points[:1]), *kept, *([] if kept[-1] == points[-1] else points[-1:])]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Moving average around each point; all of them are drawable.

    The window shrinks towards the first point, so that the line begins where the points do, and is cut off at the last
    one, so that the line does not end on the noise of one step.
    """
    half = max(1, round(len(points) * SMOOTHED_SHARE / 2)) if len(points) > 2 else 0
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    result = []
    for i, (x, _) in enumerate(points):
        first, stop = i - min(half, i), min(i + min(half, i) + 1, len(points))
        result.append((x, (sums[stop] - sums[first]) / (stop - first)))
    return result


def ticks(low: float, high: float, most: int, *, whole: bool = False) -> tuple[float, ...]:
    """At most about ``most`` round numbers from ``low`` to ``high``; integers if ``whole``."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    if whole:
        step = max(1.0, step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, 12 - math.floor(math.log10(step)))
    return tuple(round(i * step, digits) for i in range(first, last + 1))


def log_ticks(low: float, high: float, most: int) -> tuple[float, ...]:
    """About ``most`` numbers from ``low`` to ``high``, both positive, that look evenly spaced on a logarithmic axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 5), (1,)):
        found = tuple(digit * 10.0**power for power in decades for digit in digits)
        found = tuple(value for value in found if low <= value <= high)
        if 2 <= len(found) <= most + 3:
            return found
    every = -(-len(decades) // most)
    powers = tuple(10.0**power for power in decades if power % every == 0 and low <= 10.0**power <= high)
    return powers if len(powers) > 1 else ticks(low, high, most)


def number(value: float) -> str:
    """A value as a label of an axis or a line: about four digits."""
    if value and not 1e-3 <= abs(value) < 1e6:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1e3 else f"{value:.4g}"
