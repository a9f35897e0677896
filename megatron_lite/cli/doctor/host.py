"""What a host has for its ranks: cores, memory, GPUs, shared memory, disks, and what the system limits."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lite.cli.doctor.report import Line, Verdict
from megatron_lite.distributed.hosts import num_cores
from megatron_lite.utils.memory import memory_limit, readable_bytes

if TYPE_CHECKING:
    from megatron_lite.config.cluster import ClusterConfig

SHARED_MEMORY = Path("/dev/shm")
INFINIBAND = Path("/sys/class/infiniband")
GIB = 1 << 30
# NCCL takes some MiB a pair of GPUs of it where they have no peer access. Containers have 64 MiB unless told otherwise.
TOO_LITTLE_SHARED_BYTES, LITTLE_SHARED_BYTES = 128 << 20, GIB
# A checkpoint of the smallest models; one of a model of a billion parameters, with its optimizer's state.
TOO_LITTLE_DISK_BYTES, LITTLE_DISK_BYTES = 256 << 20, 16 * GIB
# Files that a rank has open beside a connection to each other rank, of which gloo makes two for each group.
FILES_OF_A_RANK, FILES_OF_A_PEER = 128, 4
USUAL_FILES = 4096
SMALL_STACK_BYTES = 1 << 20
ENOUGH_OF_WHAT_IS_PROMISED = 0.95


@dataclass(frozen=True)
class Wanted:
    """What the host is to be judged by. folders: key of the config -> folder. world_size: ranks of the run. is_bound:
    whether the launcher binds each rank to cores of its own, so that one sees its share alone."""

    cluster: ClusterConfig | None = None
    folders: tuple[tuple[str, str], ...] = ()
    ranks_here: int = 1
    world_size: int = 1
    is_bound: bool = False


def host_lines(wanted: Wanted) -> list[Line]:
    return [
        cores(num_cores(), os.cpu_count() or 1, wanted),
        main_memory(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), wanted.cluster),
        *_gpus(wanted),
        *_shared_memory(),
        *(disk(key, Path(folder)) for key, folder in wanted.folders),
        *_limits(wanted),
    ]


def cores(usable: int, there: int, wanted: Wanted) -> Line:
    """usable: those that this process may use, of those there are, which count hyperthreads."""
    if wanted.is_bound:
        usable = min(there, usable * wanted.ranks_here)
    found = f"{usable} of {there}"
    if usable < wanted.ranks_here:
        remedy = "fewer processes a node, or more cores for the job (srun --cpus-per-task, docker --cpuset-cpus)"
        return Line("cores", f"{found}, for {wanted.ranks_here} ranks", Verdict.yellow, remedy)
    if wanted.cluster is not None and usable < wanted.cluster.cores_per_node:
        remedy = "ask the scheduler for the whole node (--exclusive), or it is another kind of node"
        promised = f"{found}; {wanted.cluster.name} has {wanted.cluster.cores_per_node}"
        return Line("cores", promised, Verdict.yellow, remedy)
    return Line("cores", found)


def main_memory(num_bytes: int, cluster: ClusterConfig | None) -> Line:
    limit = memory_limit()
    usable = num_bytes if limit is None else min(num_bytes, limit.num_bytes)
    found = readable_bytes(num_bytes)
    if limit is not None and usable < num_bytes:
        found += f", of which {readable_bytes(usable)} may be used ({limit.source})"
    if cluster is not None and usable < ENOUGH_OF_WHAT_IS_PROMISED * cluster.host_memory_gib * GIB:
        promised = f"{found}; {cluster.name} has {cluster.host_memory_gib:g} GiB"
        remedy = "ask the scheduler for all of it (Slurm: --mem=0), or it is another kind of node"
        return Line("main memory", promised, Verdict.yellow, remedy)
    return Line("main memory", found)


def _gpus(wanted: Wanted) -> Iterator[Line]:
    if wanted.cluster is None or not wanted.cluster.gpus_per_node:
        return
    import torch

    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    yield gpus([device.name for device in devices], [device.total_memory for device in devices], wanted.cluster)


def gpus(names: Sequence[str], memory_bytes: Sequence[int], cluster: ClusterConfig) -> Line:
    """Those of this host beside those that the cluster promises."""
    assert cluster.gpu is not None and cluster.gpu_memory_gib is not None
    promised = f"{cluster.gpus_per_node} x {cluster.gpu}"
    found = f"{len(names)} x {', '.join(sorted(set(names)))}" if names else "none that torch sees"
    if not names:
        remedy = "ask the scheduler for them (Slurm: --gpus-per-node; docker: --gpus all), or take another --cluster"
        return Line("GPUs", f"{found}; {cluster.name} has {promised}", Verdict.red, remedy)
    smallest = min(memory_bytes)
    if len(names) < cluster.gpus_per_node or any(cluster.gpu not in name for name in names):
        remedy = "ask the scheduler for all of them (Slurm: --gpus-per-node), or it is another kind of node"
        return Line("GPUs", f"{found}; {cluster.name} has {promised}", Verdict.yellow, remedy)
    if smallest < ENOUGH_OF_WHAT_IS_PROMISED * cluster.gpu_memory_gib * GIB:
        shown = f"{found}, {readable_bytes(smallest)}; {cluster.name} has {cluster.gpu_memory_gib:g} GiB"
        remedy = "plan with the --cluster that these GPUs are of, or leave MIG (nvidia-smi -mig 0)"
        return Line("GPUs", shown, Verdict.yellow, remedy)
    return Line("GPUs", found)


def _shared_memory() -> Iterator[Line]:
    if SHARED_MEMORY.is_dir():
        usage = shutil.disk_usage(SHARED_MEMORY)
        yield shared_memory(usage.total, usage.free)


def shared_memory(num_bytes: int, free_bytes: int) -> Line:
    found = f"{readable_bytes(num_bytes)}, {readable_bytes(free_bytes)} free"
    if free_bytes < TOO_LITTLE_SHARED_BYTES and num_bytes >= LITTLE_SHARED_BYTES:
        remedy = f"remove what ended processes have left in {SHARED_MEMORY}"
        return Line("shared memory", found, Verdict.red, remedy)
    remedy = "start the container with --shm-size=16g or --ipc=host, or mount -o remount,size=16g /dev/shm"
    if free_bytes < TOO_LITTLE_SHARED_BYTES:
        return Line("shared memory", found, Verdict.red, remedy)
    if num_bytes < LITTLE_SHARED_BYTES:
        return Line("shared memory", found, Verdict.yellow, remedy)
    return Line("shared memory", found)


def disk(key: str, folder: Path) -> Line:
    """The disk under a folder, which need not be there yet."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    check = f"disk of {key}"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "cannot be written to" if there.is_dir() else "is a file"
        return Line(check, f"{there} {what}", Verdict.red, f"change its owner or mode, or name another in {key}")
    return disk_space(key, str(folder), shutil.disk_usage(there).free)


def disk_space(key: str, folder: str, free_bytes: int) -> Line:
    found = f"{folder}: {readable_bytes(free_bytes)} free"
    remedy = f"make room, or name a folder on another disk in {key}"
    if free_bytes < TOO_LITTLE_DISK_BYTES:
        return Line(f"disk of {key}", found, Verdict.red, remedy)
    if free_bytes < LITTLE_DISK_BYTES:
        return Line(f"disk of {key}", found, Verdict.yellow, f"{remedy}: a checkpoint takes up to 16 bytes a parameter")
    return Line(f"disk of {key}", found)


def _limits(wanted: Wanted) -> Iterator[Line]:
    def soft(which: int) -> int | None:
        number = resource.getrlimit(which)[0]
        return None if number == resource.RLIM_INFINITY else number

    yield open_files(soft(resource.RLIMIT_NOFILE), wanted.world_size)
    yield locked_memory(soft(resource.RLIMIT_MEMLOCK), has_infiniband=INFINIBAND.is_dir() and any(INFINIBAND.iterdir()))
    yield stack(soft(resource.RLIMIT_STACK))
    yield core_files(soft(resource.RLIMIT_CORE), wanted.ranks_here)


def open_files(limit: int | None, world_size: int) -> Line:
    check, found = "open files (ulimit -n)", "no limit" if limit is None else f"{limit:,}"
    needed = FILES_OF_A_RANK + FILES_OF_A_PEER * world_size
    remedy = f"ulimit -n {max(USUAL_FILES, needed)}, or nofile in /etc/security/limits.conf (docker: --ulimit nofile=)"
    if limit is not None and limit < needed:
        return Line(check, f"{found}, and {world_size} ranks want {needed:,}", Verdict.red, remedy)
    if limit is not None and limit < min(USUAL_FILES, 1024):
        return Line(check, found, Verdict.yellow, remedy)
    return Line(check, found)


def locked_memory(limit: int | None, *, has_infiniband: bool) -> Line:
    """InfiniBand's cards write into memory that must not move."""
    check, found = "locked memory (ulimit -l)", "no limit" if limit is None else readable_bytes(limit)
    if limit is None or not has_infiniband:
        return Line(check, found)
    remedy = (
        "memlock unlimited in /etc/security/limits.conf and in slurmd's unit (LimitMEMLOCK=infinity), or docker "
        "--ulimit memlock=-1: InfiniBand needs it"
    )
    return Line(check, found, Verdict.red if limit < GIB else Verdict.yellow, remedy)


def stack(limit: int | None) -> Line:
    check, found = "stack (ulimit -s)", "no limit" if limit is None else readable_bytes(limit)
    if limit is not None and limit < SMALL_STACK_BYTES:
        return Line(check, found, Verdict.yellow, "ulimit -s 8192")
    return Line(check, found)


def core_files(limit: int | None, ranks_here: int) -> Line:
    check, found = "core files (ulimit -c)", "no limit" if limit is None else readable_bytes(limit)
    if limit is None and ranks_here > 1:
        remedy = "ulimit -c 0: a crash would write the memory of every rank to the disk at once"
        return Line(check, f"{found}, for {ranks_here} ranks", Verdict.yellow, remedy)
    return Line(check, found)
