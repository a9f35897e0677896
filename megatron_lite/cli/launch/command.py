"""The command itself: its options, what it checks before anything starts, and the start."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from megatron_lite.cli.clusters import ClusterName
from megatron_lite.cli.common import ConfigFile, Debug, Keys, Overrides, errors_told

if TYPE_CHECKING:
    from megatron_lite.cli.launch.ways import Run


class Way(StrEnum):
    """What starts the processes."""

    local = "local"
    slurm = "slurm"
    deepspeed = "deepspeed"
    mpi = "mpi"


def launch(
    config: ConfigFile,
    overrides: Overrides = None,
    on: Annotated[Way, typer.Option(help="What starts the processes.")] = Way.local,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Number of machines.", show_default="those of --hostfile, or 1")
    ] = None,
    nproc_per_node: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes on each.",
            show_default="the GPUs of --cluster, the slots of --hostfile, or the layout",
        ),
    ] = None,
    cluster: ClusterName = None,
    hostfile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="mpi, deepspeed: the machines, a line 'NAME slots=N' for each."),
    ] = None,
    container: Annotated[
        str, typer.Option(metavar="IMAGE", help="slurm: run in this image, by enroot and pyxis.", show_default=False)
    ] = "",
    time: Annotated[
        str, typer.Option(metavar="H:MM:SS", help="slurm: longest time.", show_default="the script's")
    ] = "",
    partition: Annotated[str, typer.Option(metavar="NAME", help="slurm: the partition.", show_default="Slurm's")] = "",
    resume: Annotated[str, typer.Option(metavar="auto|PATH|none", help="As that of train.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="As that of train.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print the command, and end.")] = False,
    keys: Keys = False,
    debug: Debug = False,
) -> None:
    """Start a run by the launcher of a machine or a cluster, after checking what can be checked without processes.

    Checked are the config, its files, whether the layout fits the machines, the pipeline schedule, the memory where
    --cluster says how much there is, the host file, and that the launcher is installed. The command is printed, written
    to runs/NAME/launch.sh, and run: for Slurm it submits a job.

    Exits 2 for what you can mend, and otherwise as the command does.

    Examples:

      megatron-lite launch configs/runs/quickstart.yaml --on local --nproc-per-node 8

      megatron-lite launch configs/runs/llama3-8b-64xa100.yaml --on slurm --nodes 8 --cluster dgx-a100 --dry-run

      megatron-lite launch configs/runs/quickstart.yaml --on mpi --nodes 2 --hostfile hosts
    """
    with errors_told(debug):
        from megatron_lite.cli.launch.checks import Wish, checked_run, warn
        from megatron_lite.cli.launch.ways import WAYS

        wish = Wish(
            on=on.value,
            config=config,
            overrides=tuple(overrides or ()),
            nodes=nodes,
            ranks_per_node=nproc_per_node,
            cluster=cluster or "",
            hostfile=hostfile,
            container=container,
            time=time,
            partition=partition,
            resume=resume,
            overwrite=overwrite,
        )
        run = checked_run(wish, has_to_start=not dry_run)
        for warning in warn(run, wish):
            print(f"warning: {warning}", file=sys.stderr)
        lines = WAYS[on.value](run).lines(run.folder)
        for line in lines:
            print(f"+ {line}", flush=True)
        if not dry_run:
            _become(run, lines)


def _become(run: Run, lines: list[str]) -> NoReturn:
    """This process goes on as the command: a signal reaches it, and its exit code is the command's."""
    import shlex

    from megatron_lite.train.folder import make_log_folder
    from megatron_lite.utils import run_files

    make_log_folder(run.folder)
    script = run.folder / run_files.LAUNCH
    *before, command = lines
    head = ["#!/usr/bin/env bash", "# Starts this run as it was started.", "set -e"]
    text = [*head, f"cd {shlex.quote(str(Path.cwd()))}", *before, f"exec env {command}"]
    script.write_text("\n".join(text) + "\n", encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvp("bash", ["bash", str(script)])
