"""The curves of a run, and the picture of the first of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from megatron_lite.report.chart import Line, Panel, draw
from megatron_lite.report.run import Run
from megatron_lite.report.series import Point, is_drawable
from megatron_lite.utils import run_files
from megatron_lite.utils.files import AtomicFile

LOSS_HEIGHT, HEIGHT = 300, 90


def loss_panel(run: Run) -> Panel:
    """Training and validation loss."""
    losses = [Line("training", run.series("loss"), smooth=True)]
    if run.series("valid_loss"):
        losses.append(Line("validation", run.series("valid_loss"), marked=True))
    return Panel("loss, nats per token", losses, height=LOSS_HEIGHT, marks=_marks(run))


def other_panels(run: Run, height: int = HEIGHT) -> list[Panel]:
    """What else a step is measured by: how it learns, then what it costs. A curve without a point is left out."""
    clip = run.config.optim.clip_grad_norm
    memory, memory_unit = _in_unit(run.series("peak_memory_bytes"), (("GiB", 2**30), ("MiB", 2**20)))
    seconds, time_unit = _in_unit(run.series("step_time_s"), (("s", 1.0), ("ms", 1e-3)))
    scales = run.series("loss_scale")
    panels = [
        ("learning rate", run.series("lr"), False, None),
        ("gradient norm", run.series("grad_norm"), True, ("clipped above", clip) if clip else None),
        ("throughput, tokens/s", run.series("tokens_per_s"), True, None),
        ("model FLOPs utilisation, %", [(step, 100 * share) for step, share in run.series("mfu")], True, None),
        (f"step time, {time_unit}", seconds, True, None),
        (f"peak memory, {memory_unit}", memory, False, None),
        ("loss scale", scales if len({scale for _, scale in scales}) > 1 else [], False, None),
    ]
    return [
        Panel(title, [Line("", points, smooth)], height, from_zero=True, limit=limit, marks=_marks(run))
        for title, points, smooth, limit in panels
        if points
    ]


def _marks(run: Run) -> list[tuple[float, str]]:
    return [(step, "resumed") for step in run.resumes]


def _in_unit(points: Sequence[Point], units: Sequence[tuple[str, float]]) -> tuple[list[Point], str]:
    """The values in the first unit of which the median is at least one, or in the last unit."""
    typical = median([y for _, y in points if is_drawable(y)] or [0.0])
    name, size = next((unit for unit in units if typical >= unit[1]), units[-1])
    return [(x, y / size) for x, y in points], name


def write_picture(run: Run) -> Path:
    """Draws loss, learning rate and gradient norm into loss.svg in the run's folder. Raises DataError."""
    shown = [panel for panel in other_panels(run) if panel.title in ("learning rate", "gradient norm")]
    path = run.folder / run_files.PICTURE
    with AtomicFile(path) as file:
        file.write(draw(run.config.run.name, subtitle(run), [loss_panel(run), *shown]).encode())
    return path


def subtitle(run: Run) -> str:
    """Model, layout, precision and batch of a run in one line."""
    config = run.config
    parallel = config.parallel
    layout = " × ".join(
        f"{axis} {size}" for axis, size in (("tp", parallel.tp), ("pp", parallel.pp), ("dp", config.dp))
    )
    up_to = "up to " if config.train.batch_rampup is not None else ""
    model = f"{config.model.family}, {config.model.num_layers} layers of {config.model.hidden_size}"
    return f"{model} · {layout} · {config.train.precision} · {up_to}{config.tokens_per_step:,} tokens a step"
