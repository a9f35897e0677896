"""Whole optimizer steps of Megatron Lite beside its peers: `python benchmarks/train_step.py --help`."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

if __package__ in (None, ""):  # run as a script: the repository, not this folder, is where `benchmarks` is found
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import results
from benchmarks.results import Record
from benchmarks.rows import OURS, ROWS, Row, require, select
from benchmarks.team import ContenderFailed, Measurement, Team
from benchmarks.workloads import WORKLOADS, Optimizer, Workload, write_weights


class WorkloadName(StrEnum):
    W1 = "W1"
    W2 = "W2"
    of_25M = "25M"
    of_110M = "110M"


class Only(StrEnum):
    all = "all"
    peers = "peers"
    ours = "ours"

    def admits(self, contender: str) -> bool:
        return self is Only.all or (contender == OURS) == (self is Only.ours)


def measure(
    row: Row, workload: Workload, teams: list[Team], rounds: int, warmup: int, progress: Progress
) -> list[Record]:
    """Let the teams run the same steps in turn, so that a disturbance of the machine hits all of them alike.

    Every second round runs them in reverse order, so that none always follows the same other.
    """
    taken: list[list[Measurement]] = [[] for _ in teams]
    task = progress.add_task(row.name, total=(warmup + rounds) * len(teams), note="")
    for number in range(warmup + rounds):
        order = list(enumerate(teams))
        for index, team in order if number % 2 == 0 else reversed(order):
            measurement = team.step(number)
            taken[index].append(measurement)
            note = f"{team.job.contender} {measurement.wall_s:.3f} s, loss {measurement.loss:.4f}"
            progress.update(task, advance=1, note=note)
    return [
        Record(
            row.name, team.job.contender, team.num_parameters, team.build_peak_rss_bytes, steps[:warmup], steps[warmup:]
        )
        for team, steps in zip(teams, taken, strict=True)
    ]


def run_row(
    row: Row,
    workload: Workload,
    *,
    contenders: list[str],
    weights: str,
    cores: int,
    rounds: int,
    warmup: int,
    timeout_s: float,
    progress: Progress,
) -> list[Record]:
    """Start the row's contenders, one after the other, measure them in turn, and stop them."""
    with ExitStack() as stack:
        teams: list[Team] = []
        for contender in contenders:
            progress.console.print(f"[dim]{row.name}: starting {contender}[/dim]")
            job = row.job(contender, workload, weights, cores)
            teams.append(stack.enter_context(Team(job, timeout_s)))
        return measure(row, workload, teams, rounds, warmup, progress)


def describe_machine(cores: int) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": cores,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def show(console: Console, records: list[Record], workload: Workload) -> None:
    """A drawn table for a person who watches, and Markdown on standard output for a document."""
    lines = results.table(records, workload)
    if console.is_terminal:
        view = Table()
        for index, column in enumerate(results.COLUMNS):
            view.add_column(column, justify="left" if index < 2 else "right")
        for line in lines:
            view.add_row(*line)
        console.print(view)
    print(results.markdown(lines), flush=True)


def write_json(path: Path, workload: Workload, cores: int, records: list[Record], problems: list[str]) -> None:
    """Every measurement, and what is needed to read it: the machine, the workload, the optimizer."""
    environment = {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "GOMP_", "KMP_"))}
    derived = {"flops_per_token": workload.flops_per_token, "num_parameters": workload.num_parameters}
    document = {
        "machine": describe_machine(cores),
        "environment": environment,
        "workload": asdict(workload) | derived,
        "optimizer": asdict(Optimizer()),
        "records": [record.to_json(workload) for record in records],
        "disagreements": problems,
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def wanted_contenders(row: Row, only: Only, without: str) -> list[str]:
    """without: comma-separated, as the table names them."""
    left_out = {name.strip() for name in without.split(",")}
    return [one for one in row.contenders if only.admits(one) and one.removeprefix("peers.") not in left_out]


def main(
    rows: Annotated[
        str,
        typer.Option(
            help="Comma-separated rows, or beginnings of rows ('tp2', 'pp2-m4'), or 'all'. "
            f"There are: {', '.join(ROWS)}. Without it: single, tp2 and pp2."
        ),
    ] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Measured steps of each contender; medians want 7 or more.")] = 7,
    warmup: Annotated[int, typer.Option(min=1, help="Steps of each contender before the measured ones.")] = 2,
    workload: Annotated[
        WorkloadName,
        typer.Option(help="W1: 32.0 M parameters, W2: 124.7 M, 25M, 110M. All run 4096 tokens."),
    ] = WorkloadName.W1,
    only: Annotated[Only, typer.Option(help="Measure all contenders, or the peers, or ours, alone.")] = Only.all,
    without: Annotated[
        str, typer.Option(help="Comma-separated contenders to leave out, as the table names them ('deepspeed').")
    ] = "",
    cores: Annotated[int, typer.Option(min=1, help="Threads of a contender, over all of its processes.")] = 2,
    out: Annotated[
        Path | None, typer.Option(help="Write every measurement, with the summary, to this JSON file.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds that a contender may take to build, or for one step.")
    ] = 600.0,
    smoke: Annotated[bool, typer.Option(help="A tiny workload in the place of W1: does all of this work?")] = False,
) -> None:
    """Time whole optimizer steps (zero the gradients, forward, backward, clip by the global norm, AdamW) of Megatron
    Lite and of its peers.

    The contenders of a row do the same work: same weights, same tokens, same microbatches, same number of threads.
    Each lives in processes of its own, and they run one step each, in turn; who does not run, sleeps. The losses and
    gradient norms of all contenders are compared at every step, and the benchmark fails if they differ.

    Prints a table, and the same as Markdown: the best and the median wall time, the median of the CPU seconds summed
    over ranks, the largest resident set of any rank, and the time of ours divided by that of the contender on the line
    (ratio of medians; median of the ratios of each round): below 1 means that ours is faster.

    Example: python benchmarks/train_step.py --rows single,tp2-fp32 --rounds 9 --out step.json
    """
    console = Console(stderr=True)
    shape = WORKLOADS["smoke"] if smoke else WORKLOADS[workload.value]
    records: list[Record] = []
    problems: list[str] = []
    try:
        chosen = select(rows)
        wanted = {row.name: wanted_contenders(row, only, without) for row in chosen}
        require([contender for names in wanted.values() for contender in names])
        note = TextColumn("{task.fields[note]}")
        columns = (TextColumn("{task.description}"), BarColumn(), note, TimeElapsedColumn())
        with tempfile.TemporaryDirectory() as weights, Progress(*columns, console=console) as progress:
            write_weights(shape, Path(weights))
            for row in chosen:
                fresh = run_row(
                    row,
                    shape,
                    contenders=wanted[row.name],
                    weights=weights,
                    cores=cores,
                    rounds=rounds,
                    warmup=warmup,
                    timeout_s=timeout,
                    progress=progress,
                )
                records += fresh
                problems += results.disagreements(row, shape, fresh) + results.off_theory(row, shape, fresh)
    except (ValueError, ContenderFailed) as error:
        console.print(str(error), style="bold red", markup=False, highlight=False)
        raise typer.Exit(1) from None
    show(console, records, shape)
    if out is not None:
        write_json(out, shape, cores, records, problems)
    for warning in filter(None, map(results.spinning, records)):
        console.print(f"warning: {warning}", style="yellow", highlight=False)
    if problems:
        message = "\n".join(["the contenders did not compute the same thing:", *problems])
        console.print(message, style="bold red", markup=False)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
