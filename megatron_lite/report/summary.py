"""A run in a few lines, and its picture as a file."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, median

from rich.table import Table

from megatron_lite.report.chart import Line, Panel, draw
from megatron_lite.report.run import ReportError, Run, compressed_bits_per_byte, evaluated_share
from megatron_lite.utils import run_files

# The loss of one batch is noisy: a run ends at the mean over this share of its steps.
ENDING_SHARE = 0.03
# Samples are whole: the last tokens of a text are in none.
NEARLY_ALL = 0.95


def summary_table(run: Run) -> Table:
    """The numbers that one asks for first."""
    first, last = run.records[0], run.records[-1]
    table = Table(title=str(run.folder), title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    steps = f"{last['step']:,} of {run.config.train.num_steps:,}, {last['tokens']:,} tokens"
    table.add_row("steps", steps if run.is_finished else f"{steps} (not finished)")
    ending = run.records[-max(1, round(ENDING_SHARE * len(run.records))) :]
    of_steps = f" (mean of the last {len(ending)} steps)" if len(ending) > 1 else ""
    table.add_row("training loss", f"{first['loss']:.4f} -> {mean(r['loss'] for r in ending):.4f}{of_steps}")
    validation = run.series("valid_loss")
    if validation:
        table.add_row("validation loss", " -> ".join(f"{loss:.4f}" for _, loss in _ends(validation)))
    bits = run.series("valid_bits_per_byte")
    if bits:
        table.add_row("bits per byte", f"{bits[-1][1]:.3f}{_on_what(run)}")
    # The first steps warm up caches and allocators.
    steady = run.records[len(run.records) // 10 :]
    speed, mfu = (median(record[key] for record in steady) for key in ("tokens_per_s", "mfu"))
    table.add_row("speed", f"{speed:,.0f} tokens/s, model FLOPs utilisation {mfu:.0%}")
    table.add_row("peak memory", f"{last['peak_memory_bytes'] / 2**20:,.0f} MiB in the largest process")
    return table


def write_picture(run: Run) -> Path:
    """Draws loss, learning rate and gradient norm into loss.svg in the run's folder. Raises ReportError."""
    losses = [Line("training", run.series("loss"), smooth=True)]
    if run.series("valid_loss"):
        losses.append(Line("validation", run.series("valid_loss"), marked=True))
    panels = [
        Panel("loss, nats per token", losses, height=300),
        Panel("learning rate", [Line("", run.series("lr"))], height=90, from_zero=True),
        Panel("gradient norm", [Line("", run.series("grad_norm"))], height=90, from_zero=True),
    ]
    path = run.folder / run_files.PICTURE
    try:
        path.write_text(draw(run.config.run.name, _subtitle(run), panels), encoding="utf-8")
    except OSError as error:
        raise ReportError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def _on_what(run: Run) -> str:
    """What the bits per byte are of, and those of a compressor, which has to have been given the same text."""
    share = evaluated_share(run)
    if share is not None and share < NEARLY_ALL:
        return f"   (on the first {share:.0%} of the validation text; train.eval_batches sets how much)"
    xz = None if share is None else compressed_bits_per_byte(run)
    return "" if xz is None else f"   (xz -9 on the same text: {xz:.3f})"


def _ends(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return points if len(points) == 1 else [points[0], points[-1]]


def _subtitle(run: Run) -> str:
    config = run.config
    parallel = config.parallel
    layout = " × ".join(
        f"{axis} {size}" for axis, size in (("tp", parallel.tp), ("pp", parallel.pp), ("dp", config.dp))
    )
    model = f"{config.model.family}, {config.model.num_layers} layers of {config.model.hidden_size}"
    return f"{model} · {layout} · {config.train.precision} · {config.tokens_per_step:,} tokens a step"
