"""A run as the command that starts it: one function for each launcher, of plain values, which starts nothing."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_lite.config.cluster import ClusterConfig
from megatron_lite.utils import run_files


@dataclass(frozen=True)
class Run:
    """What is to run, and where. root: the folder that holds launch/. arguments: of `megatron-lite train`.

    folder: of the run. is_cuda: whether each process takes a GPU. hosts: names of the machines; none: this one.
    interface: the network interface between them that the config names.
    """

    root: Path
    python: str
    arguments: Sequence[str]
    name: str
    folder: Path
    nodes: int
    ranks_per_node: int
    is_cuda: bool = False
    cluster: ClusterConfig | None = None
    hosts: tuple[str, ...] = ()
    interface: str = ""
    container: str = ""
    time: str = ""
    partition: str = ""

    def script(self, path: str) -> str:
        return str(self.root / "launch" / path)


@dataclass(frozen=True)
class Command:
    """A command line, with what it needs in its environment beside what is there already.

    hostfile: a file that has to be there, and what stands in it.
    """

    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    hostfile: tuple[Path, Sequence[str]] | None = None

    def lines(self, folder: Path) -> list[str]:
        """As a shell reads it, with what has to be there before: the folder of the run, and the host file."""
        before = [f"mkdir -p {shlex.quote(str(folder))}"]
        if self.hostfile is not None:
            path, hosts = self.hostfile
            before.append(f"printf '%s\\n' {shlex.join(hosts)} >{shlex.quote(str(path))}")
        given = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return [*before, " ".join([*given, shlex.join(self.arguments)])]


def local(run: Run) -> Command:
    script = ["bash", run.script("local.sh"), "--nproc", str(run.ranks_per_node)]
    return Command([*script, *run.arguments], {"PYTHON": run.python})


def slurm(run: Run) -> Command:
    """A batch job with a task for each process. What the script asks for by default suits nodes of 8 GPUs."""
    options = [
        f"--job-name={run.name}",
        f"--nodes={run.nodes}",
        f"--ntasks-per-node={run.ranks_per_node}",
        f"--gpus-per-node={run.ranks_per_node if run.is_cuda else 0}",
        f"--cpus-per-task={_cores_of_rank(run)}",
        f"--output={run.folder / 'slurm-%j.out'}",
    ]
    options += [f"--time={run.time}"] if run.time else []
    options += [f"--partition={run.partition}"] if run.partition else []
    environment = {"MEGATRON_LITE_ROOT": str(run.root)}
    # In a container it is the container's own.
    environment |= {"CONTAINER_IMAGE": run.container} if run.container else {"PYTHON": run.python}
    return Command(["sbatch", *options, run.script("slurm/train_srun.sbatch"), *run.arguments], environment)


def _cores_of_rank(run: Run) -> int:
    """As many as the node has for it; of a node that nobody has described, one without a GPU, eight with."""
    if run.cluster is None:
        return 8 if run.is_cuda else 1
    return max(1, run.cluster.cores_per_node // run.ranks_per_node)


def deepspeed(run: Run) -> Command:
    """One machine needs no ssh. The host file is the run's own, of those machines that it takes."""
    hostfile = run.folder / run_files.HOSTFILE
    options = ["--hostfile", str(hostfile), "--nproc", str(run.ranks_per_node)]
    options += ["--no-ssh", "--node-rank", "0"] if run.nodes == 1 else []
    hosts = [f"{host} slots={run.ranks_per_node}" for host in run.hosts or ("localhost",)]
    script = ["bash", run.script("deepspeed/train.sh"), *options, *run.arguments]
    return Command(script, {"PYTHON": run.python}, (hostfile, hosts))


def mpi(run: Run) -> Command:
    slots = ",".join(f"{host}:{run.ranks_per_node}" for host in run.hosts)
    options = ["--hosts", slots] if run.hosts else ["--nproc", str(run.ranks_per_node)]
    options += ["--interface", run.interface] if run.interface else []
    return Command(["bash", run.script("mpi/train.sh"), *options, *run.arguments], {"PYTHON": run.python})


# Launcher -> its command.
WAYS = {"local": local, "slurm": slurm, "deepspeed": deepspeed, "mpi": mpi}
