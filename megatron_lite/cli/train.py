"""megatron-lite train"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Annotated

import typer

from megatron_lite.cli.common import ConfigFile, Debug, Keys, Overrides, errors_told
from megatron_lite.cli.deepspeed import DeepSpeedFile, with_deepspeed
from megatron_lite.cli.ranks import check_nproc, started_by_launcher
from megatron_lite.cli.report import show_report


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None,
        typer.Option(help="Start this many processes on this machine.", show_default="join a launcher, or one"),
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
    deepspeed: DeepSpeedFile = None,
    keys: Keys = False,
    debug: Debug = False,
) -> None:
    """Train a model.

    Leaves config.yaml, metrics.jsonl, checkpoints and a report in runs/NAME. Ctrl-C, SIGTERM and
    SIGUSR1 leave a checkpoint; after them, or after a crash, the same command goes on.

    Examples:

      megatron-lite train configs/runs/quickstart.yaml --nproc 8

      megatron-lite train configs/runs/quickstart.yaml --nproc 4 parallel.pp=4 parallel.tp=1 train.num_steps=50

      megatron-lite train configs/runs/quickstart.yaml run.name=longer --resume runs/quickstart train.num_steps=600

      megatron-lite train configs/runs/quickstart.yaml --nproc 8 --deepspeed configs/deepspeed/zero2-bf16.json

      torchrun --nproc-per-node 8 -m megatron_lite train configs/runs/quickstart.yaml

      srun --ntasks 8 python -m megatron_lite train configs/runs/quickstart.yaml
    """
    from megatron_lite.distributed.rank import run_rank

    arguments = (config, overrides or [], deepspeed, resume, overwrite, port)
    if nproc is None and started_by_launcher():
        raise typer.Exit(run_rank(_train_here, arguments))
    with errors_told(debug):
        if nproc is None:
            raise typer.Exit(_train_here(*arguments))
        else:
            raise typer.Exit(_train_in_processes(*arguments, nproc=nproc))


def _train_here(
    path: Path, overrides: list[str], deepspeed: Path | None, resume: str, overwrite: bool, port: int | None
) -> int:
    """This process as one rank of the world that a launcher made, or as the only one; returns the exit code."""
    from megatron_lite.config import load_config
    from megatron_lite.distributed.environments import find_place
    from megatron_lite.train.stop import StopSignals

    if port is not None:
        raise ValueError(
            f"--port is {port}, where the processes of --nproc would meet, and there is no --nproc; add it, or leave "
            "--port out (torchrun takes --master-port)"
        )
    place = find_place(os.environ)
    with StopSignals(announce=place.rank == 0) as signals:
        from megatron_lite.distributed.rendezvous import refuse_together

        try:
            given = with_deepspeed(path, overrides, deepspeed, world_size=place.world_size, told=place.rank == 0)
            config = load_config(path, given, world_size=place.world_size, files_exist=True)
        except (ValueError, OSError) as error:
            refuse_together(error)  # of the other ranks some may have another file, and would wait for this one
            raise

        from megatron_lite.train.folder import run_folder
        from megatron_lite.train.loop import run

        exit_code = run(config, resume=resume, overwrite=overwrite, signals=signals)
    if place.rank == 0 and exit_code == 0:
        show_report(run_folder(config))
    return exit_code


def _train_in_processes(
    path: Path,
    overrides: list[str],
    deepspeed: Path | None,
    resume: str,
    overwrite: bool,
    port: int | None,
    *,
    nproc: int,
) -> int:
    """Starts the processes, after everything that can be checked without them; returns the exit code."""
    from megatron_lite.train.stop import StopSignals

    with StopSignals(announce=True):  # until the launcher takes the signals, nothing is there to be kept
        from megatron_lite.config import load_config
        from megatron_lite.distributed.launch import launch_local
        from megatron_lite.pipeline.prove_batches import prove_batches
        from megatron_lite.train.folder import choose_source, make_log_folder, run_folder
        from megatron_lite.train.metrics import check_extras
        from megatron_lite.zero.files import OffloadError
        from megatron_lite.zero.offload_folder import remove_stale_folders

        check_nproc(nproc)
        given = with_deepspeed(path, overrides, deepspeed, world_size=nproc)
        config = load_config(path, given, world_size=nproc, files_exist=True)
        folder = run_folder(config)
        prove_batches(config)
        choose_source(config, resume, overwrite=overwrite)
        check_extras(config)
        logs = make_log_folder(folder)
    module = "megatron_lite.train.loop"
    exit_code = launch_local(
        f"{module}:run",
        (config,),
        {"resume": resume, "overwrite": overwrite},
        nproc=nproc,
        port=port,
        log_dir=logs,
        preload=(module,),
        grace_s=config.run.stop_grace_s,
        keeps_state=True,
    )
    if exit_code == 0:
        show_report(folder)
    elif config.offload.dir is not None:
        with contextlib.suppress(OffloadError):
            remove_stale_folders(config.offload.dir)  # those of ranks that were ended
    return exit_code
