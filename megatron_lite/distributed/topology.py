"""Where a rank sits in a layout, as arithmetic on integers. Nothing here starts a process or lists the ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

# From the slowest to the fastest: neighbours along `tp` have consecutive ranks, so they share a node.
AXES = ("pp", "dp", "cp", "ep", "tp")


@dataclass(frozen=True)
class Layout:
    """How many ranks lie along each mesh axis. ``world_size`` is their product."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if self.size(axis) < 1:
                raise ValueError(f"layout: {axis}={self.size(axis)}; every axis needs at least one rank")

    def size(self, axis: str) -> int:
        size: int = getattr(self, axis)
        return size

    @property
    def world_size(self) -> int:
        return math.prod(self.size(axis) for axis in AXES)

    def stride(self, axis: str) -> int:
        """Difference in rank between neighbours along ``axis``."""
        return math.prod(self.size(faster) for faster in AXES[AXES.index(axis) + 1 :])

    def index(self, rank: int, axis: str) -> int:
        """Coordinate of ``rank`` on ``axis``."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside this layout of {self.world_size} ranks ({self})")
        return rank // self.stride(axis) % self.size(axis)

    def coordinate(self, rank: int) -> dict[str, int]:
        return {axis: self.index(rank, axis) for axis in AXES}

    def rank(self, **coordinate: int) -> int:
        """The rank at a coordinate; an axis that is left out counts as 0."""
        for axis, index in coordinate.items():
            if not 0 <= index < self.size(axis):
                raise ValueError(f"coordinate {axis}={index} is outside 0..{self.size(axis) - 1}")
        return sum(coordinate.get(axis, 0) * self.stride(axis) for axis in AXES)

    def ranks_along(self, rank: int, axis: str) -> range:
        """All ranks that differ from ``rank`` on ``axis`` only, in order."""
        first = rank - self.index(rank, axis) * self.stride(axis)
        return range(first, first + self.size(axis) * self.stride(axis), self.stride(axis))

    def __str__(self) -> str:
        named = [f"{axis}{self.size(axis)}" for axis in ("tp", "pp", "dp", "cp", "ep") if self.size(axis) > 1]
        return " ".join(named) or "1 process"
