"""megatron-lite train"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from megatron_lite.cli.common import ConfigFile, Debug, Keys, Overrides, errors_told
from megatron_lite.cli.ranks import check_nproc, started_by_torchrun
from megatron_lite.cli.report import show_report


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None,
        typer.Option(help="Start this many processes on this machine.", show_default="join torchrun, or one"),
    ] = None,
    port: Annotated[int | None, typer.Option(help="Where the processes meet.", show_default="a free one")] = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|PATH|none",
            help="auto: go on with the run of the same name from its newest checkpoint that is whole, if it has one. "
            "PATH: go on from a checkpoint, or from the newest of a run. none: begin anew.",
        ),
    ] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run of the same name, its checkpoints too.")
    ] = False,
    keys: Keys = False,
    debug: Debug = False,
) -> None:
    """Train a model.

    Leaves config.yaml, metrics.jsonl, checkpoints and a report in runs/NAME. Ctrl-C and SIGTERM
    leave a checkpoint; after them, or after a crash, the same command goes on.

    Examples:

      megatron-lite train configs/runs/quickstart.yaml --nproc 8

      megatron-lite train configs/runs/quickstart.yaml --nproc 4 parallel.pp=4 parallel.tp=1 train.num_steps=50

      megatron-lite train configs/runs/quickstart.yaml run.name=longer --resume runs/quickstart train.num_steps=600

      torchrun --nproc-per-node 8 -m megatron_lite train configs/runs/quickstart.yaml
    """
    from megatron_lite.distributed.launch import run_rank

    arguments = (config, overrides or [], resume, overwrite, port)
    if nproc is None and started_by_torchrun():
        raise typer.Exit(run_rank(_train_here, arguments))
    with errors_told(debug):
        if nproc is None:
            raise typer.Exit(_train_here(*arguments))
        else:
            raise typer.Exit(_train_in_processes(*arguments, nproc=nproc))


def _train_here(path: Path, overrides: list[str], resume: str, overwrite: bool, port: int | None) -> int:
    """This process as one rank of the world that a launcher made, or as the only one; returns the exit code."""
    from megatron_lite.config import load_config
    from megatron_lite.distributed.rendezvous import discover

    if port is not None:
        raise ValueError(
            f"--port is {port}, where the processes of --nproc would meet, and there is no --nproc; add it, or leave "
            "--port out (torchrun takes --master-port)"
        )
    place = discover(os.environ)
    config = load_config(path, overrides, world_size=place.world_size, files_exist=True)

    from megatron_lite.train.folder import run_folder
    from megatron_lite.train.loop import run

    if place.attempt:
        # torchrun has started the ranks again, with the same arguments: what they have done so far is not to be lost.
        resume, overwrite = "auto", False
    exit_code = run(config, resume=resume, overwrite=overwrite)
    if place.rank == 0 and exit_code == 0:
        show_report(run_folder(config))
    return exit_code


def _train_in_processes(
    path: Path, overrides: list[str], resume: str, overwrite: bool, port: int | None, *, nproc: int
) -> int:
    """Starts the processes, after everything that can be checked without them; returns the exit code."""
    from megatron_lite.config import load_config
    from megatron_lite.distributed.launch import launch_local
    from megatron_lite.pipeline.prove import prove_run
    from megatron_lite.train.folder import choose_source, make_log_folder, run_folder
    from megatron_lite.train.metrics import check_extras

    check_nproc(nproc)
    config = load_config(path, overrides, world_size=nproc, files_exist=True)
    folder = run_folder(config)
    prove_run(config)
    choose_source(config, resume, overwrite=overwrite)
    check_extras(config)
    module = "megatron_lite.train.loop"
    exit_code = launch_local(
        f"{module}:run",
        (config,),
        {"resume": resume, "overwrite": overwrite},
        nproc=nproc,
        port=port,
        log_dir=make_log_folder(folder),
        preload=(module,),
    )
    if exit_code == 0:
        show_report(folder)
    return exit_code
