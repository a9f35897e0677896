"""Who am I: from the environment that a launcher left behind to an initialised process group.

`discover` is a pure function of the environment. `world` brings up the default process group of whatever it found,
one process included, so that no code further in has to ask whether it runs alone.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from megatron_lite.distributed.hosts import num_cores, use_loopback

# What torchrun sets and this module uses.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
ADDRESS_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")


class RendezvousError(ConnectionError):
    """The ranks did not find one another. The message says what to change."""


@dataclass(frozen=True)
class Rendezvous:
    """This process's place in the world, and where the ranks meet (nowhere, for one process).

    `store_is_served` says that the launcher's agent already serves the store at the address; if not, rank 0 does.
    `attempt` counts restarts of the world by the launcher: each attempt meets under keys of its own.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: Literal["single", "torchrun"]
    backend: Literal["gloo", "nccl"]
    device: torch.device
    host: str = ""
    port: int = 0
    store_is_served: bool = False
    attempt: int = 0

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


def discover(environ: Mapping[str, str], *, num_cuda_devices: int = 0) -> Rendezvous:
    """Read this process's place from `environ`: torchrun's variables, or, without any of them, a world of one.

    `num_cuda_devices` is how many devices this process can see; with none the ranks compute on the CPU and talk gloo.
    LOCAL_RANK is never derived from RANK: nothing says how ranks are laid over hosts.

    Raises ValueError if the variables are incomplete, contradictory, or ask for a device that is not there.
    """
    if not any(name in environ for name in RANK_VARIABLES):
        device = torch.device("cuda", 0) if num_cuda_devices else torch.device("cpu")
        return Rendezvous(0, 1, 0, 1, "single", "nccl" if num_cuda_devices else "gloo", device)
    missing = [name for name in (*RANK_VARIABLES, *ADDRESS_VARIABLES) if not environ.get(name)]
    if missing:
        present = ", ".join(f"{name}={environ[name]}" for name in RANK_VARIABLES if environ.get(name))
        raise ValueError(
            f"the environment has {present or 'empty rank variables'} but not {', '.join(missing)}; start the ranks "
            f"with torchrun, which sets them all, or unset {', '.join(RANK_VARIABLES)} to run one process"
        )
    rank, world_size, local_rank, local_world_size = (_integer(environ, name) for name in RANK_VARIABLES)
    for name, value, size_name, size in (
        ("RANK", rank, "WORLD_SIZE", world_size),
        ("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_world_size),
        ("LOCAL_WORLD_SIZE", local_world_size - 1, "WORLD_SIZE", world_size),
    ):
        if not 0 <= value < size:
            raise ValueError(f"{name}={environ[name]} does not fit {size_name}={size}; start the ranks with torchrun")
    if num_cuda_devices and local_rank >= num_cuda_devices:
        raise ValueError(
            f"LOCAL_RANK={local_rank}, but this host shows {num_cuda_devices} CUDA device(s); start at most "
            f"{num_cuda_devices} process(es) per host, or set CUDA_VISIBLE_DEVICES= (empty) to compute on the CPU"
        )
    return Rendezvous(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        launcher="torchrun",
        backend="nccl" if num_cuda_devices else "gloo",
        device=torch.device("cuda", local_rank) if num_cuda_devices else torch.device("cpu"),
        host=environ["MASTER_ADDR"],
        port=_integer(environ, "MASTER_PORT"),
        store_is_served=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=_integer(environ, "TORCHELASTIC_RESTART_COUNT") if "TORCHELASTIC_RESTART_COUNT" in environ else 0,
    )


def init_process_group(rendezvous: Rendezvous, timeout_s: float) -> None:
    """Initialise the default process group; `timeout_s` bounds this call and every later collective.

    Raises RendezvousError, with the remedy, if the ranks do not meet, or on every rank if they compute on different
    kinds of device.
    """
    timeout = timedelta(seconds=timeout_s)
    if rendezvous.device.type == "cuda":
        torch.cuda.set_device(rendezvous.device)
    if rendezvous.launcher == "single":  # no port, no file: nobody else has to find the store
        dist.init_process_group(rendezvous.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    try:
        store = dist.TCPStore(
            rendezvous.host,
            rendezvous.port,
            rendezvous.world_size,
            is_master=rendezvous.rank == 0 and not rendezvous.store_is_served,
            timeout=timeout,
        )
        attempt_store = dist.PrefixStore(f"attempt-{rendezvous.attempt}", store)
        _check_devices(rendezvous, attempt_store)
        dist.init_process_group(
            rendezvous.backend,
            store=attempt_store,
            rank=rendezvous.rank,
            world_size=rendezvous.world_size,
            timeout=timeout,
            device_id=rendezvous.device if rendezvous.device.type == "cuda" else None,
        )
    except (RuntimeError, TimeoutError) as error:  # torch's own DistError types are RuntimeErrors
        raise RendezvousError(_explain(rendezvous, timeout_s, error)) from error


def _check_devices(rendezvous: Rendezvous, store: dist.Store) -> None:
    """Each rank looks only at its own host: on a mixed cluster some would wait on gloo for others that are on NCCL."""
    store.set(f"device/{rendezvous.rank}", rendezvous.device.type)
    answers = store.multi_get([f"device/{rank}" for rank in range(rendezvous.world_size)])
    kinds = [answer.decode() for answer in answers]
    other = next((rank for rank, kind in enumerate(kinds) if kind != kinds[0]), None)
    if other is not None:
        raise RendezvousError(
            f"rank 0 computes on {kinds[0]} and rank {other} on {kinds[other]}; start the ranks on hosts that have a "
            "GPU for each of them, or set run.device=cpu"
        )


@contextlib.contextmanager
def world(
    environ: Mapping[str, str] | None = None,
    *,
    timeout_s: float = 600.0,
    threads: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> Iterator[Rendezvous]:
    """The default process group for the length of a `with` block.

    Reads `environ` (default: the process's) once, sets torch's number of threads (default: the cores this process may
    use, divided among the ranks of this host), joins the group, and leaves it: after a barrier when all went well, so
    that no rank breaks the last messages of another, and at once when the block raised. `device="cpu"` leaves the
    GPUs of the host alone; `device="cuda"` insists on one; "auto" takes them where there is one for each rank here.

    Raises ValueError for an environment that makes no sense, RendezvousError if the ranks do not meet.
    """
    num_cuda_devices = 0 if device == "cpu" else torch.cuda.device_count()
    if device == "cuda" and not num_cuda_devices:
        raise ValueError(
            "device is 'cuda', but torch finds no CUDA device; use 'cpu', or install a CUDA build of torch"
        )
    environ = os.environ if environ is None else environ
    if device == "auto" and num_cuda_devices < discover(environ).local_world_size:
        num_cuda_devices = 0
    rendezvous = discover(environ, num_cuda_devices=num_cuda_devices)
    if rendezvous.local_world_size == rendezvous.world_size:
        use_loopback()
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or max(1, num_cores() // rendezvous.local_world_size))
    try:
        init_process_group(rendezvous, timeout_s)
        try:
            yield rendezvous
            dist.barrier()
        except BaseException:
            _leave_after_error(rendezvous)
            raise
        dist.destroy_process_group()
    finally:
        torch.set_num_threads(threads_before)


def _integer(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ValueError(f"{name}={environ[name]!r} is not an integer; start the ranks with torchrun") from None


def _leave_after_error(rendezvous: Rendezvous) -> None:
    """Drop the group without waiting for anyone. The error that ended the block is the one that must be seen."""
    with contextlib.suppress(Exception):
        if rendezvous.backend == "nccl":
            # An orderly shutdown of NCCL waits for kernels whose peers may never come.
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()


def _explain(rendezvous: Rendezvous, timeout_s: float, error: Exception) -> str:
    """One message for a failed rendezvous: what happened, where, and what to change."""
    text = str(error)
    first_line = text.strip().split("\n", 1)[0]
    where = f"rank {rendezvous.rank} of {rendezvous.world_size}"
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        return (
            f"{where} cannot listen on {rendezvous.address}: the port is in use; choose another with --port "
            "(torchrun: --master-port), or leave it out: a free one is taken"
        )
    if "connectFullMesh" in text or "connectfullmesh" in text.lower():
        return (
            f"{where} cannot reach another rank ({first_line}); if a host's name resolves to an address that other "
            "hosts cannot reach (127.0.1.1 in /etc/hosts is common), set GLOO_SOCKET_IFNAME to the network interface "
            "between them"
        )
    if isinstance(error, TimeoutError) or "timed out" in text.lower() or "timeout" in text.lower():
        return (
            f"{where} waited {timeout_s:g} s at {rendezvous.address} for the others; check that all "
            f"{rendezvous.world_size} ranks were started with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE, and "
            "that a firewall does not stand between the hosts"
        )
    return f"{where} could not join the others at {rendezvous.address}: {first_line}"
