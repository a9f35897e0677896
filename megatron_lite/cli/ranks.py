"""A function run as ranks: of the world that a launcher started, of processes started here, or as the only one."""

from __future__ import annotations

import os
from typing import Any

import typer

from megatron_lite.cli.common import errors_told
from megatron_lite.distributed.environments import is_launched


def started_by_launcher() -> bool:
    """Whether this process is one of the ranks of torchrun, srun, mpirun or another launcher."""
    return is_launched(os.environ)


def check_nproc(nproc: int) -> None:
    """Raises ValueError unless this process may start that many."""
    if started_by_launcher():
        raise ValueError(
            "--nproc starts processes, and this one was started by a launcher already (torchrun, srun, mpirun or "
            "deepspeed); leave one of them out"
        )
    if nproc < 1:
        raise ValueError(f"--nproc is {nproc}; it must be at least 1")


def run_in_ranks(module: str, function: str, args: tuple[Any, ...], *, nproc: int | None, debug: bool) -> None:
    """Calls ``module.function(*args)`` and ends the command with its exit code.

    nproc: processes to start on this machine; None joins a launcher's, or makes this process the only one. Of started
    ones the first has the terminal.
    """
    import importlib

    from megatron_lite.distributed.launch import launch_local
    from megatron_lite.distributed.rank import run_rank

    if nproc is None and started_by_launcher():
        raise typer.Exit(run_rank(getattr(importlib.import_module(module), function), args))
    with errors_told(debug):
        if nproc is None:
            getattr(importlib.import_module(module), function)(*args)
            return
        check_nproc(nproc)
        raise typer.Exit(launch_local(f"{module}:{function}", args, nproc=nproc, preload=(module,)))
