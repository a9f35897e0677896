"""The section of a report about the pipeline: a step as it should have gone, and as it went."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lite.pipeline.idle import Cause, Facts, facts_of
from megatron_lite.pipeline.instructions import Kind
from megatron_lite.pipeline.partition import costs_from_timeline
from megatron_lite.pipeline.simulate import Costs, Links, simulate
from megatron_lite.pipeline.timeline import Timeline, read_timeline
from megatron_lite.report.markup import Markup, tag
from megatron_lite.report.pipeline_picture import MAX_ROWS, UNITS, picture, shortest_drawn, swatch
from megatron_lite.report.pipeline_rows import Box, rows_of
from megatron_lite.report.pipeline_trace import chrome_trace
from megatron_lite.report.run import ReportError
from megatron_lite.utils import run_files
from megatron_lite.utils.files import AtomicFile

LEAST_SHARE = 5e-4  # of the time at work; what is idle for less is left out of the table
STYLE = """
.pipeline { padding: 16px 18px 14px }
.pipeline p { color: var(--soft); font-size: 13px }
.pipeline .scroll { overflow-x: auto; margin: 12px 0 6px }
.pipeline .scroll svg { display: block; width: 100%; min-width: 680px }
.pipeline .swatches { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 10px 0 4px; list-style: none }
.pipeline .swatches { font-size: 13px; color: var(--soft) }
.pipeline .swatches li { display: inline-flex; align-items: center; gap: 7px }
.pipeline + .numbers { margin-top: 14px }
"""


@dataclass(frozen=True)
class RecordedStep:
    """A step of a run, and its simulation: the same lists, with the medians of what was recorded as costs."""

    recorded: Timeline
    simulated: Timeline
    latency_s: float

    @property
    def named(self) -> tuple[tuple[str, Timeline], ...]:
        return ("simulated", self.simulated), ("recorded", self.recorded)


def recorded_step(folder: Path) -> RecordedStep | None:
    """The step that a run recorded; None if it recorded none. Raises DataError for a broken record."""
    path = folder / run_files.PIPELINE
    if not path.exists():
        return None
    recorded = read_timeline(path)
    links = Links.measured(recorded)
    simulated = simulate(recorded.as_schedule(), Costs.measured(recorded), links)
    return RecordedStep(recorded, simulated, links.latency_s)


def require_step(folder: Path) -> RecordedStep:
    """Raises ReportError, with the way to record one, if the run recorded no step."""
    step = recorded_step(folder)
    if step is None:
        raise ReportError(
            f"{folder}: has no {run_files.PIPELINE}: the run recorded no step of a pipeline; "
            "train with parallel.pp of 2 or more, and run.record_pipeline=3 to record step 3"
        )
    return step


def write_trace(folder: Path, step: RecordedStep) -> Path:
    """Writes pipeline.trace.json, for Perfetto, into the run's folder. Raises DataError."""
    path = folder / run_files.PIPELINE_TRACE
    with AtomicFile(path) as file:
        file.write(json.dumps(chrome_trace(step.recorded), separators=(",", ":")).encode())
    return path


def write_layer_costs(folder: Path, step: RecordedStep) -> Path:
    """Writes what a layer, the embedding and the head took, a file for ``parallel.partition``, into the run's folder.

    Raises DataError.
    """
    path = folder / run_files.LAYER_COSTS
    with AtomicFile(path) as file:
        file.write(json.dumps(costs_from_timeline(step.recorded, step.recorded.chunk_layers)).encode())
    return path


def fact_rows(facts: Sequence[Facts]) -> list[tuple[str, list[str]]]:
    """The numbers of timelines side by side, as text. Idle times are means over the ranks."""
    rows = [
        ("step", [in_unit(one.makespan) for one in facts]),
        ("at work, mean of the ranks", [_mean(one, sum(one.busy)) for one in facts]),
        ("bubble, share of the step", [f"{float(one.bubble_share):.1%}" for one in facts]),
        ("bubble, over the time at work", [f"{float(one.bubble_ratio):.1%}" for one in facts]),
    ]
    for cause in Cause:
        times = [one.idle_by_cause[cause] for one in facts]
        if any(time >= LEAST_SHARE * sum(one.busy) for one, time in zip(facts, times, strict=True)):
            rows.append((f"idle: {cause.value}", [_mean(one, time) for one, time in zip(facts, times, strict=True)]))
    peaks = [f"{max(one.peak_activations):g}" for one in facts]
    return [*rows, ("most activations kept, chunks", peaks)]


def _mean(facts: Facts, total: float) -> str:
    mean = float(total) / len(facts.busy)
    share = mean / float(facts.makespan) if facts.makespan else 0.0
    return f"{in_unit(mean)} ({share:.1%})"


def in_unit(seconds: float) -> str:
    """``1.2 s``, ``3.45 ms``"""
    unit, size = next((unit for unit in UNITS if seconds >= 0.9995 * unit[1]), UNITS[-1])
    return f"{float(seconds) / size:.3g} {unit}"


def pipeline_section(step: RecordedStep) -> Markup:
    """The simulated and the recorded timeline under each other, and their numbers."""
    facts = [facts_of(timeline) for _, timeline in step.named]
    titles = [
        f"{name}: {in_unit(one.makespan)}, bubble {float(one.bubble_share):.1%}"
        for (name, _), one in zip(step.named, facts, strict=True)
    ]
    timelines = [(title, timeline) for title, (_, timeline) in zip(titles, step.named, strict=True)]
    drawing = Markup(picture(timelines, f"What each pipeline rank does over time; {'; '.join(titles)}"))
    boxes = [box for _, timeline in timelines for row in rows_of(timeline, _shortest(step)) for box in row]
    card = tag(
        "div",
        tag("p", _about(step)),
        _legend(boxes),
        tag("div", drawing, class_="scroll", tabindex=0, role="group", aria_label="Timelines"),
        *(tag("p", note) for note in _left_out(step, boxes)),
        class_="pipeline card",
    )
    return tag("section", tag("h2", "Pipeline"), card, _table(step, facts), id="pipeline")


def _about(step: RecordedStep) -> str:
    recorded = step.recorded
    num_ranks, num_chunks = len(recorded.ranks), recorded.placement.num_chunks
    chunks = f" with {num_chunks} chunks in different shades" if num_chunks > num_ranks else ""
    message = f", and {in_unit(step.latency_s)} for a message that is waited for" if step.latency_s else ""
    return (
        f"Step {recorded.step}: {recorded.schedule}, {recorded.num_microbatches} microbatches on {num_ranks} "
        f"ranks{chunks}. The simulation runs the same lists of instructions with the recorded step's medians as "
        f"costs{message}."
    )


def _shortest(step: RecordedStep) -> float:
    return shortest_drawn([step.recorded, step.simulated])


def _left_out(step: RecordedStep, boxes: Sequence[Box]) -> list[str]:
    num_ranks = len(step.recorded.ranks)
    notes = []
    if num_ranks > MAX_ROWS:
        notes.append(f"Drawn are {MAX_ROWS} of {num_ranks} ranks; {run_files.PIPELINE} has all of them.")
    if any(box.top > 0 and box.end - box.start > _shortest(step) / 2 for box in boxes):
        limit = in_unit(_shortest(step))
        notes.append(f"Neighbouring boxes below {limit} are drawn as a stack, in which heights are shares of the time.")
    return notes


def _legend(boxes: Sequence[Box]) -> Markup:
    drawn = {box.what for box in boxes}
    items = []
    for what in (*Kind, *Cause):
        if what in drawn:
            name = f"idle: {what.value}" if isinstance(what, Cause) else what.value
            items.append(tag("li", Markup(swatch(what)), name))
    return tag("ul", *items, class_="swatches")


def _table(step: RecordedStep, facts: Sequence[Facts]) -> Markup:
    corner = tag("th", tag("span", "what", class_="unseen"), scope="col")
    head = [corner, *(tag("th", name, scope="col") for name, _ in step.named)]
    rows = [
        tag("tr", tag("th", name, scope="row"), *(tag("td", value) for value in values))
        for name, values in fact_rows(facts)
    ]
    caption = tag("caption", "The simulated and the recorded step in numbers", class_="unseen")
    table = tag("table", caption, tag("thead", tag("tr", *head)), tag("tbody", *rows))
    return tag("div", table, class_="numbers card")
