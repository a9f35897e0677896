"""report.html: everything about a run on one page, in one file that needs no network and no script.

The script reads values out of the charts and does nothing else. The page forbids itself, by its content security
policy, to load anything or to run any other script.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from megatron_lite.report import pipeline, pipeline_picture
from megatron_lite.report.chart import DARK_STYLE, STYLE, Line, Panel, Scale, plot, step_range, step_scale, value_scale
from megatron_lite.report.curves import loss_panel, other_panels, subtitle
from megatron_lite.report.markup import Markup, tag, together
from megatron_lite.report.memory import memory_section
from megatron_lite.report.run import Run
from megatron_lite.report.sections import config_section, facts_section, layout_section, steps_section
from megatron_lite.report.series import Point, number, thinned
from megatron_lite.report.summary import Fact
from megatron_lite.utils import run_files
from megatron_lite.utils.files import AtomicFile

SMALL_HEIGHT = 150
# Pixels that a chart is at most wide, to which its curves are thinned: a page of any run stays below a megabyte.
WIDE_COLUMNS, SMALL_COLUMNS = 1000, 500
WITH_LOG = ("loss", "gradient norm")


def write_page(run: Run, facts: Sequence[Fact]) -> Path:
    """Writes report.html into the run's folder. Raises DataError."""
    path = run.folder / run_files.REPORT
    with AtomicFile(path) as file:
        file.write(page(run, facts).encode())
    return path


def page(run: Run, facts: Sequence[Fact]) -> str:
    """The page of a run, as text of an HTML file."""
    name = run.config.run.name
    script = Markup(_resource("page.js"))
    dark = f"@media screen and (prefers-color-scheme: dark) {{{DARK_STYLE}{pipeline_picture.DARK_STYLE}}}"
    own = f"{STYLE}{pipeline_picture.STYLE}{pipeline.STYLE}"
    style = Markup(f"{_resource('page.css')}{own}{dark}\n")
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    last, num_steps = run.records[-1]["step"], run.config.train.num_steps
    state = ("finished", "finished") if run.is_finished else ("unfinished", f"step {last:,} of {num_steps:,}")
    charts, curves = _charts(run)
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{name}: a run of Megatron Lite"),
        tag("link", rel="icon", href="data:,"),
        tag("style", style),
    ]
    header = [
        tag("p", "Megatron Lite", class_="kicker"),
        tag("div", tag("h1", name), tag("span", state[1], class_=f"state {state[0]}"), class_="title"),
        tag("p", subtitle(run), class_="subtitle"),
    ]
    read_from = f"Read from {run_files.METRICS} and {run_files.CONFIG} of {run.config.run.dir}/{name}."
    step = pipeline.recorded_step(run.folder)
    sections = [facts_section(facts), charts, *([pipeline.pipeline_section(step)] if step is not None else [])]
    memory = memory_section(run.folder)
    sections += [layout_section(run.config), *([memory] if memory else []), config_section(run.config)]
    body = [
        tag("header", *header),
        tag("main", together([*sections, steps_section(run)], "\n")),
        tag("footer", tag("p", read_from)),
        # "<" would be the only way out of the element.
        tag("script", Markup(json.dumps(curves).replace("<", "\\u003c")), type="application/json", id="curves"),
        tag("script", script),
    ]
    html = tag("html", "\n", tag("head", together(head, "\n")), "\n", tag("body", together(body, "\n")), lang="en")
    return f"<!doctype html>\n{html}\n"


def _charts(run: Run) -> tuple[Markup, dict[str, Any]]:
    """The section of the charts, and the values that the script reads out of them."""
    panels = [loss_panel(run), *other_panels(run, SMALL_HEIGHT)]
    first, last = step_range(panels)
    figures, data = [], []
    for panel in panels:
        figure, values = _figure(panel, panels, is_wide=panel is panels[0])
        figures.append(figure)
        data.append(values)
    slider = tag("input", type="range", min=first, max=last, value=last, step=1, id="step")
    reader = tag("div", tag("label", "step", for_="step"), slider, tag("output", number(last)), id="reader")
    bar = tag("div", tag("h2", "Curves"), reader, class_="bar")
    section = tag("section", bar, tag("div", together(figures, "\n"), class_="charts"))
    return section, {"first": first, "last": last, "panels": data}


def _figure(panel: Panel, panels: Sequence[Panel], *, is_wide: bool) -> tuple[Markup, dict[str, Any]]:
    columns = WIDE_COLUMNS if is_wide else SMALL_COLUMNS
    across = step_scale(panels, 10 if is_wide else 5)
    name, _, unit = panel.title.partition(", ")
    scales = {"linear": value_scale(panel), "log": value_scale(panel, log=True) if name in WITH_LOG else None}
    plots = []
    for kind, up in scales.items():
        if up is not None:
            about = tag("x", _in_words(panel, name, unit)).removeprefix("<x>").removesuffix("</x>")
            place = f'class="{kind}" width="100%" height="{panel.height}" role="img" aria-label="{about}"'
            plots.append(Markup("\n".join(plot(panel, across, up, place, steps=True, ends=False, columns=columns))))
    legend, series = _legend(panel, columns)
    caption = [tag("h3", f"{name} ", *([tag("small", unit)] if unit else [])), legend]
    if scales["log"] is not None:
        caption.append(_scale_switch(name))
    gaps = sum(len(line.points) - len(line.drawable) for line in panel.lines)
    note = [tag("p", f"Not a number at {gaps:,} steps, where the dots are red.", class_="gap")] if gaps else []
    figure = tag(
        "figure",
        tag("figcaption", *caption),
        tag("div", *plots, class_="plots"),
        *note,
        class_="wide" if is_wide else None,
    )
    return figure, {"series": series, "scales": [_as_json(up) for up in scales.values() if up is not None]}


def _legend(panel: Panel, columns: int) -> tuple[Markup, list[dict[str, Any]]]:
    """The names of the curves with their last values, and the values at each step in the same order."""
    items, series = [], []
    for colour, line in enumerate(panel.lines):
        curves: list[tuple[str, Sequence[Point], str]] = [(line.name, line.drawable, f"k{colour}")]
        if line.smooth and len(line.drawable) > 1:
            curves = [(line.name or "each step", line.drawable, f"k{colour} raw")]
            curves.append(("smoothed", line.shown, f"k{colour}"))
        for name, points, classes in curves:
            if points:
                label = [name, " "] if name else []
                items.append(tag("li", *label, tag("output", number(points[-1][1])), class_=classes))
                series.append(_series(points, columns, colour))
    return tag("ul", *items, class_="legend"), series


def _series(points: Sequence[Point], columns: int, colour: int) -> dict[str, Any]:
    kept = thinned(points, columns)
    return {"colour": colour, "x": [x for x, _ in kept], "y": [float(f"{y:.6g}") for _, y in kept]}


def _scale_switch(name: str) -> Markup:
    group = f"scale-{name.replace(' ', '-')}"
    options = [
        tag(
            "label",
            tag("input", type="radio", name=group, class_=f"to-{kind}", checked=kind == "linear"),
            tag("span", kind),
        )
        for kind in ("linear", "log")
    ]
    return tag("fieldset", tag("legend", f"scale of {name}", class_="unseen"), *options, class_="scale")


def _in_words(panel: Panel, name: str, unit: str) -> str:
    """What a chart shows, for those who cannot see it."""
    return f"{name}{f' in {unit}' if unit else ''}: " + "; ".join(_line_in_words(line) for line in panel.lines)


def _line_in_words(line: Line) -> str:
    points = line.drawable
    if not points:
        return f"{line.name} no value".strip()
    (first, begin), (last, end) = points[0], points[-1]
    low, high = min(y for _, y in points), max(y for _, y in points)
    span = f"{number(begin)} at step {first:,} to {number(end)} at step {last:,}"
    return f"{line.name} {span}, between {number(low)} and {number(high)}".strip()


def _as_json(scale: Scale) -> dict[str, Any]:
    return {"low": scale.low, "high": scale.high, "log": scale.log}


def _resource(name: str) -> str:
    return (files("megatron_lite.report") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """What a content security policy calls the only script, or style, that it allows."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
