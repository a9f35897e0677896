"""The command itself: its options, and where it runs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from megatron_lite.cli.clusters import ClusterName
from megatron_lite.cli.common import Debug, Overrides, errors_told
from megatron_lite.cli.doctor.request import Request
from megatron_lite.cli.ranks import check_nproc, started_by_launcher


class Device(StrEnum):
    """Where an implementation would run."""

    cpu = "cpu"
    cuda = "cuda"


def doctor(
    overrides: Overrides = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Say what the kernels of this config will run.")
    ] = None,
    device: Annotated[
        list[Device] | None,
        typer.Option(help="Ask for a device, which need not be there. May be given twice.", show_default="those there"),
    ] = None,
    cluster: ClusterName = None,
    nproc: Annotated[
        int | None, typer.Option(help="Start this many processes on this machine, and measure between them.")
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(min=1, help="Run on so many nodes of a Slurm cluster, by srun, and measure between them."),
    ] = None,
    nproc_per_node: Annotated[
        int | None,
        typer.Option(min=1, help="Processes on each of --nodes.", show_default="the GPUs of --cluster, or 1"),
    ] = None,
    layout: Annotated[
        str,
        typer.Option(metavar="tp=2,pp=2,dp=2", help="Measure along each axis of it.", show_default="--config's, or dp"),
    ] = "",
    timeout: Annotated[float, typer.Option(metavar="SECONDS", min=1, help="Longest wait for another process.")] = 60,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="For every backend that cannot run, say why.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Say what is installed, which implementation of each operation runs on it, what the host and its network have,
    and, with several processes, how fast they reach one another.

    Each line is green, yellow or red, with the remedy. Exits 2 if one is red: what should be mended, such as a library
    that does not load, a host name that leads nowhere, a link with less than 30 % of what --cluster promises.

    Examples:

      megatron-lite doctor

      megatron-lite doctor --device cuda --verbose

      megatron-lite doctor --config configs/runs/quickstart.yaml kernels.attention=reference

      megatron-lite doctor --nproc 8 --layout tp=2,pp=2,dp=2

      megatron-lite doctor --nodes 2 --cluster dgx-a100 --layout tp=8,dp=2

      torchrun --nnodes 2 --nproc-per-node 8 ... -m megatron_lite doctor --cluster dgx-a100
    """
    if overrides and config is None:
        raise typer.BadParameter("keys replace those of a config: name it with --config")
    chosen = [one.value for one in device or ()]
    request = Request(chosen, config, overrides or [], verbose, as_json, cluster or "", layout, timeout)
    if nproc is None and started_by_launcher():
        from megatron_lite.cli.doctor.ranks import examine
        from megatron_lite.distributed.launch import run_rank

        raise typer.Exit(run_rank(examine, (request,)))
    with errors_told(debug):
        request.load_cluster()
        if nodes is not None and nproc is not None:
            raise ValueError("--nproc is of this machine and --nodes of a cluster, which takes --nproc-per-node")
        if nodes is None and nproc_per_node is not None:
            raise ValueError("--nproc-per-node is of --nodes; processes on this machine are started by --nproc")
        if nodes is not None:
            from megatron_lite.cli.doctor.nodes import run_on_nodes

            run_on_nodes(request, nodes, nproc_per_node)
        if nproc is not None:
            raise typer.Exit(_examine_in_processes(request, nproc))
        if layout:
            raise ValueError("--layout is measured between processes: start them with --nproc, --nodes or a launcher")
        raise typer.Exit(_examine_here(request))


def _examine_here(request: Request) -> int:
    from megatron_lite.cli.doctor.here import lines_here, sections_here
    from megatron_lite.cli.doctor.report import print_report
    from megatron_lite.distributed import hosts

    config = request.load_config()
    is_cpu = config is not None and config.run.device == "cpu"
    chosen = hosts.chosen_interface("gloo" if is_cpu else "nccl") or hosts.chosen_interface("gloo")
    return print_report(sections_here(request, lines_here(request, chosen=chosen)), as_json=request.as_json)


def _examine_in_processes(request: Request, nproc: int) -> int:
    from megatron_lite.cli.doctor.ranks import layout_of
    from megatron_lite.distributed.launch import launch_local

    check_nproc(nproc)
    layout_of(request, nproc)
    module = "megatron_lite.cli.doctor.ranks"
    return launch_local(f"{module}:examine", (request,), nproc=nproc, preload=(module,))
