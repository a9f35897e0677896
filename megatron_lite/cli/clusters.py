"""The option --cluster, and what follows from it: the size of the world, the memory of a rank, the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megatron_lite.config.cluster import ClusterConfig
    from megatron_lite.config.schema import RunConfig

ClusterName = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="NAME",
        help="What a node has: dgx-a100, another file of configs/clusters, or the path of one.",
        show_default=False,
    ),
]


def world_of(cluster: ClusterConfig | None, nodes: int | None, world: int | None) -> int | None:
    """Processes of a run on so many nodes; None where nothing says it. Raises ValueError for what does not go together.

    A process on each GPU. Of nodes without GPUs, `world` says how many processes share them.
    """
    if nodes is None:
        return world
    if cluster is None:
        raise ValueError("--nodes counts nodes of a cluster: name it with --cluster, or give --world")
    if not cluster.gpus_per_node:
        return world
    gpus = nodes * cluster.gpus_per_node
    if world not in (None, gpus):
        raise ValueError(
            f"--world is {world}, and {nodes} nodes of {cluster.name} have {gpus} GPUs, a process on each; leave one "
            "of --world and --nodes out"
        )
    return gpus


def rank_memory_bytes(cluster: ClusterConfig, all_on_node: int) -> int:
    """What the device of a rank has. all_on_node: processes that share a node without GPUs."""
    return int(cluster.memory_of_rank_gib(all_on_node) * 2**30)


def device_on(cluster: ClusterConfig | None, run: RunConfig) -> str | None:
    """What ranks compute on there; None where `run.device` alone decides."""
    return cluster.device if cluster is not None and run.run.device == "auto" else None
