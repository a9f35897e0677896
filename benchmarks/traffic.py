"""What the collectives of one rank carry, counted where every contender calls them: in `torch.distributed`.

A collective counts with the size of its whole tensor, as in the analysis of ZeRO (Rajbhandari et al. 2020, section 7):
an all-gather and a broadcast with what is gathered, a reduce-scatter, a reduce and an all-to-all (which our
reduce-scatter is made of) with what is summed, an all-reduce with both. A ring sends (N - 1) / N of it from each of N
ranks. Messages between two ranks are not counted: only pipelines send them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

GATHERS, SUMS, BOTH = (True, False), (False, True), (True, True)
# Which argument holds the whole tensor (or the list of its parts), and what is done with it.
COLLECTIVES: dict[str, tuple[int, tuple[bool, bool]]] = {
    "all_gather": (0, GATHERS),
    "all_gather_single": (0, GATHERS),
    "all_gather_into_tensor": (0, GATHERS),
    "broadcast": (0, GATHERS),
    "reduce": (0, SUMS),
    "reduce_scatter": (1, SUMS),
    "reduce_scatter_single": (1, SUMS),
    "reduce_scatter_tensor": (1, SUMS),
    "all_to_all_single": (1, SUMS),
    "all_reduce": (0, BOTH),
}


@dataclass(frozen=True)
class Traffic:
    """Of one step on one rank; `elements` and `bytes` are of both."""

    gathered_elements: int = 0
    reduced_elements: int = 0
    bytes: int = 0

    @property
    def elements(self) -> int:
        return self.gathered_elements + self.reduced_elements

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.gathered_elements + other.gathered_elements,
            self.reduced_elements + other.reduced_elements,
            self.bytes + other.bytes,
        )


class TrafficCounter:
    """Counts from `install` on; a contender that keeps a function of `torch.distributed` must be imported after it."""

    def __init__(self) -> None:
        self._total = Traffic()
        self._inside = False

    def install(self) -> None:
        for name, (position, kind) in COLLECTIVES.items():
            if hasattr(dist, name):  # all_gather_single and reduce_scatter_single are new names in torch 2.13
                setattr(dist, name, self._counting(getattr(dist, name), position, kind))

    def take(self) -> Traffic:
        """What was counted since the last call."""
        taken, self._total = self._total, Traffic()
        return taken

    def _counting(self, collective: Callable[..., Any], position: int, kind: tuple[bool, bool]) -> Callable[..., Any]:
        name_of_whole = list(inspect.signature(collective).parameters)[position]

        @functools.wraps(collective)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._inside:  # one collective by way of another
                return collective(*args, **kwargs)
            whole = args[position] if position < len(args) else kwargs[name_of_whole]
            self._total += _traffic_of([whole] if isinstance(whole, Tensor) else whole, kind)
            self._inside = True
            try:
                return collective(*args, **kwargs)
            finally:
                self._inside = False

        return counted


def _traffic_of(parts: list[Tensor], kind: tuple[bool, bool]) -> Traffic:
    gathers, sums = kind
    elements = sum(part.numel() for part in parts)
    size = sum(part.numel() * part.element_size() for part in parts)
    return Traffic(elements * gathers, elements * sums, size * (gathers + sums))
