"""A run in a few numbers: the rows of a table in the terminal, the tiles of a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from statistics import fmean, median

from rich.table import Table

from megatron_lite.report.run import Run, compressed_bits_per_byte, evaluated_share
from megatron_lite.report.series import is_drawable

# The loss of one batch is noisy: a run ends at the mean over this share of its steps.
ENDING_SHARE = 0.03
# Samples are whole: the last tokens of a text are in none.
NEARLY_ALL = 0.95


@dataclass(frozen=True)
class Fact:
    """A number of a run, as text. before: what it was at the first step. note: what has to be known to read it."""

    name: str
    value: str
    unit: str = ""
    before: str = ""
    note: str = ""


def facts_of(run: Run) -> list[Fact]:
    """The numbers that one asks for first; those that the metrics do not hold are left out."""
    last = run.records[-1]
    notes = [f"{last['tokens']:,} tokens"] if "tokens" in last else []
    notes += [] if run.is_finished else ["not finished"]
    facts = [Fact("steps", f"{last['step']:,}", f"of {run.config.train.num_steps:,}", note=", ".join(notes))]
    if skipped := last.get("skipped_steps"):
        value, of = f"{skipped:,}", f"of {last['step']:,}"
        facts.append(Fact("skipped steps", value, of, note="a gradient overflowed in fp16"))
    losses = [point for point in run.series("loss") if is_drawable(point[1])] or run.series("loss")[-1:]
    ending = [loss for _, loss in losses[-max(1, round(ENDING_SHARE * len(losses))) :]]
    note = f"mean of the last {len(ending)} steps" if len(ending) > 1 else ""
    before = f"{losses[0][1]:.4f}" if len(losses) > 1 else ""
    facts.append(Fact("training loss", f"{fmean(ending):.4f}", before=before, note=note))
    validation = run.series("valid_loss")
    if validation:
        before = f"{validation[0][1]:.4f}" if len(validation) > 1 else ""
        facts.append(Fact("validation loss", f"{validation[-1][1]:.4f}", before=before))
    bits = run.series("valid_bits_per_byte")
    if bits:
        facts.append(Fact("bits per byte", f"{bits[-1][1]:.3f}", note=_on_what(run)))
    return facts + _speed(run)


def _speed(run: Run) -> list[Fact]:
    """What the steps cost. The first tenth is left out of the medians: it warms up caches and allocators."""

    def steady(key: str) -> float | None:
        values = [value for _, value in run.series(key) if is_drawable(value)]
        return median(values[len(values) // 10 :]) if values else None

    facts = []
    speed, mfu, memory = steady("tokens_per_s"), steady("mfu"), run.records[-1].get("peak_memory_bytes")
    if speed is not None:
        facts.append(Fact("speed", f"{speed:,.0f}", "tokens/s"))
    if mfu is not None:
        facts.append(Fact("model FLOPs utilisation", f"{mfu:.0%}"))
    if memory is not None:
        facts.append(Fact("peak memory", f"{memory / 2**20:,.0f}", "MiB", note="in the largest process"))
    seconds = [value for _, value in run.series("step_time_s") if is_drawable(value)]
    if seconds and sum(seconds) < timedelta.max.total_seconds():
        each = f"{len(seconds):,} steps of {median(seconds):.3g} s" if len(seconds) > 1 else ""
        facts.append(Fact("time in steps", duration(sum(seconds)), note=each))
    return facts


def duration(seconds: float) -> str:
    """``0.25 s``, ``42 s``, ``1:23:05``, ``3 days, 4:00:12``"""
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 100 else _clock(seconds)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def summary_table(run: Run, facts: Sequence[Fact]) -> Table:
    """The facts as they are printed."""
    table = Table(title=str(run.folder), title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for fact in facts:
        value = f"{fact.before} -> {fact.value}" if fact.before else fact.value
        table.add_row(fact.name, f"{value} {fact.unit}".rstrip() + (f"   ({fact.note})" if fact.note else ""))
    return table


def _on_what(run: Run) -> str:
    """What the bits per byte are of, and those of a compressor, which has to have been given the same text."""
    share = evaluated_share(run)
    if share is not None and share < NEARLY_ALL:
        return f"on the first {share:.0%} of the validation text; train.eval_batches sets how much"
    xz = None if share is None else compressed_bits_per_byte(run)
    return "" if xz is None else f"xz -9 on the same text: {xz:.3f}"
