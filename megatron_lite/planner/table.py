"""Predictions as the rows of a table."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lite.planner.amounts import Amount
from megatron_lite.planner.memory import CATEGORIES, LABELS, MemoryPrediction
from megatron_lite.utils.memory import readable_bytes

PLACES = {"device": "", "host": " in main memory", "disk": " in files"}


def rows_of(name: str, amounts: Sequence[Amount | None]) -> list[list[str]]:
    """A row for each place where any of these amounts has bytes, and for the device; a cell is empty for None."""
    rows = []
    for place, note in PLACES.items():
        values = [None if amount is None else getattr(amount, place) for amount in amounts]
        if any(values) or place == "device":
            cells = ("" if value is None else readable_bytes(value) for value in values)
            rows.append([LABELS.get(name, name) + note, *cells])
    return rows


def stage_rows(stages: Sequence[MemoryPrediction]) -> list[list[str]]:
    """A row for each category and place that has any bytes, then their totals; a column for each stage."""
    rows = [row for name in CATEGORIES for row in rows_of(name, [stage.of(name) for stage in stages])]
    return rows + rows_of("total", [stage.total for stage in stages])


def largest(stages: Sequence[MemoryPrediction]) -> MemoryPrediction:
    """The stage with the most on its device; the first of equal ones."""
    return max(stages, key=lambda stage: stage.total.device)
