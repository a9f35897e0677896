"""The verdicts as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from megatron_lite.verify.proof import BOUNDS, Verdict


def verdict_table(verdicts: Sequence[Verdict], dtype: str) -> Table:
    """One row a layout: largest relative differences from one process in float64, and what is bitwise equal."""
    bound = BOUNDS[dtype]
    table = Table(
        title=f"{dtype}: largest difference from one process, relative to the largest entry (bound {bound:.0e})",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("layout", overflow="fold")
    for name in ("loss", "grad norm", "gradients", "parameters"):
        table.add_column(name, justify="right", min_width=7)
    table.add_column("bitwise equal to", overflow="fold")
    table.add_column("")
    for v in verdicts:
        if not v.holds and not v.difference and v.bitwise is None:
            table.add_row(str(v.layout), "", "", "", "", "", "[red]ranks disagree[/red]")
            continue
        numbers = [_number(x, bound) for x in (v.loss, v.grad_norm, v.gradient, v.parameter)]
        bits = "" if v.bitwise is None else f"{'' if v.bitwise else '[red]not[/red] '}{v.layout.base()}"
        table.add_row(str(v.layout), *numbers, bits, "[green]holds[/green]" if v.holds else "[red]broken[/red]")
    return table


def _number(value: float, bound: float) -> str:
    text = f"{value:.1e}" if value else "0"
    return text if value <= bound else f"[red]{text}[/red]"


def complaints(verdicts: Sequence[Verdict]) -> list[str]:
    """One line for each layout that does not hold: the first value and parameter that differ, and the axis."""
    lines = []
    for v in verdicts:
        if not v.holds:
            amount = f" differs by {v.difference:.1e}" if v.difference else ""
            parameter = f"; first parameter: {v.broken_parameter}" if v.broken_parameter else ""
            lines.append(f"{v.layout}: {v.broken}{amount}{parameter}; axis: {v.axis}")
    return lines
