"""How parameters lie in flat buckets, and which slice of a bucket each data-parallel rank owns. Pure integers.

A bucket is a unit of the model: the embedding, a layer, the head. A tied table has a bucket of its own on either
side, so that its two gradients are sliced alike wherever they are. Everything is aligned to ``ALIGNMENT`` elements:
slices, parameters and the blocks of the gradient norm then begin at the same places in every layout, and vectorised
code never splits a parameter differently.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ALIGNMENT = 256


@dataclass(frozen=True)
class Interval:
    """Elements ``[start, stop)`` of a bucket."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def intersect(self, other: Interval) -> Interval:
        start = max(self.start, other.start)
        return Interval(start, max(start, min(self.stop, other.stop)))

    def shift(self, offset: int) -> Interval:
        return Interval(self.start + offset, self.stop + offset)


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies in its bucket."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def interval(self) -> Interval:
        return Interval(self.start, self.start + math.prod(self.shape))


@dataclass(frozen=True)
class BucketLayout:
    """The slots of a bucket, and its size, padded so that ``num_slices`` aligned slices divide it.

    There are as many as data-parallel ranks, also where fewer, larger slices are held.
    """

    name: str
    slots: tuple[Slot, ...]
    size: int
    num_slices: int

    @property
    def whole(self) -> Interval:
        return Interval(0, self.size)

    def slice(self, index: int, of: int | None = None) -> Interval:
        """One of ``of`` equal slices, by default of ``num_slices``."""
        share = self.size // (of or self.num_slices)
        return Interval(index * share, (index + 1) * share)


def lay_out(name: str, shapes: Iterable[tuple[str, tuple[int, ...]]], num_slices: int) -> BucketLayout:
    """Places parameters one behind the other, each at an aligned start."""
    slots, end = [], 0
    for parameter, shape in shapes:
        slots.append(Slot(parameter, shape, end))
        end += math.ceil(math.prod(shape) / ALIGNMENT) * ALIGNMENT
    step = ALIGNMENT * num_slices
    return BucketLayout(name, tuple(slots), math.ceil(end / step) * step, num_slices)


def unit_of(parameter: str, tied: Sequence[str]) -> str:
    """The bucket that a parameter belongs to. ``tied``: names of parameters that share their values."""
    if parameter in tied:
        return parameter
    parts = parameter.split(".")
    if parts[0] == "layers":
        return ".".join(parts[:2])
    return "head" if parts[0] == "final_norm" else parts[0]


def merge(intervals: Iterable[Interval]) -> list[Interval]:
    """The same elements in the fewest intervals, in order."""
    merged: list[Interval] = []
    for interval in sorted((i for i in intervals if i.size), key=lambda i: i.start):
        if merged and interval.start <= merged[-1].stop:
            merged[-1] = Interval(merged[-1].start, max(merged[-1].stop, interval.stop))
        else:
            merged.append(interval)
    return merged
