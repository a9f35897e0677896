"""megatron-lite report"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_lite.cli.common import Debug, errors_told


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    pipeline: Annotated[
        bool, typer.Option("--pipeline", help="Show the recorded step of the pipeline, and write it as a trace.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Sum up a run, and write report.html: its curves, its layout and its config on one page.

    The page needs no network. loss.svg is a picture for a README: loss, learning rate and gradient norm.
    A run that recorded a step of its pipeline (run.record_pipeline) has it on its page, beside its simulation; the
    trace of --pipeline is for https://ui.perfetto.dev. layer_costs.json, what a layer and the head took, can be the
    parallel.partition of the next run.

    Examples:

      megatron-lite report runs/quickstart

      megatron-lite report runs/quickstart --pipeline
    """
    with errors_told(debug):
        if pipeline:
            show_pipeline(run)
        show_report(run)


def show_report(folder: Path) -> None:
    """Prints the numbers of a run, and writes its page and its picture."""
    from rich.console import Console

    from megatron_lite.report.curves import write_picture
    from megatron_lite.report.page import write_page
    from megatron_lite.report.run import read_run
    from megatron_lite.report.summary import facts_of, summary_table

    run = read_run(folder)
    facts = facts_of(run)
    written = {"report": write_page(run, facts), "picture": write_picture(run)}
    console = Console()
    console.print(summary_table(run, facts))
    for name, path in written.items():
        console.print(f"{name}: {path}", highlight=False, soft_wrap=True)


def show_pipeline(folder: Path) -> None:
    """Draws the recorded step of a run's pipeline, prints its numbers, and writes its trace."""
    from rich.console import Console
    from rich.table import Table

    from megatron_lite.pipeline.idle import facts_of
    from megatron_lite.report.pipeline import fact_rows, require_step, write_layer_costs, write_trace
    from megatron_lite.report.pipeline_text import text_picture

    step = require_step(folder)
    written = {
        "trace": write_trace(folder, step),
        "layer costs, for parallel.partition": write_layer_costs(folder, step),
    }
    console = Console()
    table = Table(box=None, pad_edge=False)
    table.add_column(f"step {step.recorded.step}, {step.recorded.schedule}", style="bold")
    for name, timeline in step.named:
        table.add_column(name, justify="right")
        console.print(
            f"{name}:\n{text_picture(timeline, console.width)}", markup=False, highlight=False, soft_wrap=True
        )
    for name, values in fact_rows([facts_of(timeline) for _, timeline in step.named]):
        table.add_row(name, *values)
    console.print(table)
    for name, path in written.items():
        console.print(f"{name}: {path}", highlight=False, soft_wrap=True)
