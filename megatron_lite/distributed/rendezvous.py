"""Who am I: from the environment that a launcher left behind to an initialised process group.

`discover` is a pure function of the environment. `world` brings up the default process group of whatever it found,
one process included, so that no code further in has to ask whether it runs alone.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_lite.distributed.environments import Place, find_place, has_own_device
from megatron_lite.distributed.hosts import interface_in_use, num_cores, use_interface, use_loopback
from megatron_lite.distributed.meeting import Store, facts_of, meet
from megatron_lite.distributed.roll_call import RollCall

# A host's name may come to the name servers a little after the host.
NAME_PATIENCE_S = 15.0


class RendezvousError(ConnectionError):
    """The ranks did not find one another. The message says what to change."""


@dataclass(frozen=True)
class Rendezvous(Place):
    """A place, the device to compute on, and what the ranks talk over. num_hosts: known once they have met."""

    backend: Literal["gloo", "nccl"] = "gloo"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    num_hosts: int = 1

    def __str__(self) -> str:
        """One line for people: ``4 ranks on 2 hosts, found by srun (job 17 step 0); gloo over eth0; they meet at
        node1:29517``."""
        if not self.launcher:
            return f"1 rank, as no launcher is in the environment; {self.backend} alone"
        found = f"{'started' if self.launcher == '--nproc' else 'found'} by {self.launcher}"
        job = f" ({self.job})" if self.job else ""
        who = f"{_counted(self.world_size, 'rank')} on {_counted(self.num_hosts, 'host')}, {found}{job}"
        if self.world_size == 1:
            return f"{who}; {self.backend} alone"
        interface = interface_in_use(self.backend)
        over = f"{self.backend} over {interface}" if interface else self.backend
        return f"{who}; {over}; they meet at {self.address}"


def discover(environ: Mapping[str, str], *, num_cuda_devices: int = 0) -> Rendezvous:
    """This process's place, from `environ` (`environments.find_place`), and its device.

    `num_cuda_devices` is how many devices this process can see; with none the ranks compute on the CPU and talk gloo.
    Where Slurm has given each task a device of its own, that is the one it sees, as number 0.

    Raises ValueError if the variables are incomplete, contradictory, or ask for a device that is not there.
    """
    return on_device(find_place(environ), environ, num_cuda_devices)


def own_place() -> Place:
    """The place that this process's environment gives it."""
    return find_place(os.environ)


def on_device(place: Place, environ: Mapping[str, str], num_cuda_devices: int) -> Rendezvous:
    """The place with its device: see `discover`."""
    if not num_cuda_devices:
        return Rendezvous(**vars(place))
    index = 0 if has_own_device(environ, place, num_cuda_devices) else place.local_rank
    if index >= num_cuda_devices:
        raise ValueError(
            f"LOCAL_RANK={place.local_rank}, but this host shows {num_cuda_devices} CUDA device(s); start at most "
            f"{num_cuda_devices} process(es) per host, or set CUDA_VISIBLE_DEVICES= (empty) to compute on the CPU"
        )
    return Rendezvous(**vars(place), backend="nccl", device=torch.device("cuda", index))


def init_process_group(
    rendezvous: Rendezvous,
    timeout_s: float,
    *,
    meet_timeout_s: float | None = None,
    settings: Mapping[str, Any] | None = None,
    problem: str = "",
    before: Callable[[Store, Rendezvous], None] | None = None,
) -> tuple[Rendezvous, dist.Store | None]:
    """Meets the other ranks and initialises the default process group; returns what all of them now know, and the store
    that they share (none for one process).

    timeout_s: bounds every later collective. meet_timeout_s: until all ranks have come (default: the same). settings:
    what has to be the same on every rank, by key. problem: why this rank cannot take part, for all of them to hear.
    before: called with the store that the ranks share, before they judge one another; not in a world of one.

    Raises RendezvousError, with the remedy, if the ranks do not meet; MeetingError on every rank, with one message, if
    one has a problem, or their devices, versions or settings differ.
    """
    meet_timeout_s = timeout_s if meet_timeout_s is None else meet_timeout_s
    timeout = timedelta(seconds=timeout_s)
    if rendezvous.device.type == "cuda":
        torch.cuda.set_device(rendezvous.device)
    if rendezvous.world_size == 1:  # no port, no file: nobody else has to find the store
        if problem:
            raise ValueError(problem)
        dist.init_process_group(rendezvous.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return rendezvous, None
    try:
        _wait_for_name(rendezvous)
        is_master = rendezvous.rank == 0 and not rendezvous.store_is_served
        store = _connect(rendezvous, meet_timeout_s, is_master=is_master)
        if before is not None:
            before(dist.PrefixStore("before", store), rendezvous)
        facts = facts_of(
            rendezvous,
            device=rendezvous.device.type,
            own_device=_device_id(rendezvous.device),
            settings=settings or {},
            problem=problem,
        )
        met = meet(store, rendezvous, facts, settings or {}, meet_timeout_s)
        dist.init_process_group(
            rendezvous.backend,
            store=store,
            rank=rendezvous.rank,
            world_size=rendezvous.world_size,
            timeout=timeout,
            device_id=rendezvous.device if rendezvous.device.type == "cuda" else None,
        )
    except (RuntimeError, TimeoutError) as error:  # torch's own DistError types are RuntimeErrors
        raise RendezvousError(_explain(rendezvous, meet_timeout_s, error)) from error
    return replace(rendezvous, num_hosts=met.num_hosts, attempt=met.attempt), store


def _connect(place: Place, timeout_s: float, *, is_master: bool = False) -> dist.Store:
    store = dist.TCPStore(
        place.host,
        place.port,
        place.world_size,
        is_master=is_master,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,  # the meeting knows who has come
    )
    # An agent's store still holds what the ranks before a restart have written.
    return dist.PrefixStore(f"attempt-{place.attempt}" if place.store_is_served else "world", store)


@contextlib.contextmanager
def world(
    environ: Mapping[str, str] | None = None,
    *,
    timeout_s: float = 600.0,
    meet_timeout_s: float | None = None,
    threads: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    interface: str | None = None,
    settings: Mapping[str, Any] | None = None,
    problem: str = "",
    before: Callable[[Store, Rendezvous], None] | None = None,
) -> Iterator[Rendezvous]:
    """The default process group for the length of a `with` block.

    Reads `environ` (default: the process's) once, sets torch's number of threads (default: the cores this process may
    use, divided among the ranks of this host), joins the group, and leaves it: after a barrier when all went well, so
    that no rank breaks the last messages of another, and at once when the block raised. `device="cpu"` leaves the
    GPUs of the host alone; `device="cuda"` insists on one; "auto" takes them where there is one for each rank here.
    interface: the network interface to talk over; None: what GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME say, or what
    gloo and NCCL choose. timeout_s, meet_timeout_s, settings, problem, before: see `init_process_group`.

    Raises ValueError for an environment that makes no sense, RendezvousError if the ranks do not meet, MeetingError if
    they do not agree.
    """
    environ = os.environ if environ is None else environ
    place = find_place(environ)
    rendezvous = Rendezvous(**vars(place))
    try:
        if interface is not None:
            use_interface(interface)
        rendezvous = _with_device(place, environ, device)
    except ValueError as error:
        problem = problem or str(error)
    if rendezvous.local_world_size == rendezvous.world_size:
        use_loopback()
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or max(1, num_cores() // rendezvous.local_world_size))
    try:
        rendezvous, store = init_process_group(
            rendezvous, timeout_s, meet_timeout_s=meet_timeout_s, settings=settings, problem=problem, before=before
        )
        roll_call = None if store is None else RollCall(place, store, _connect(place, timeout_s))
        try:
            with roll_call or contextlib.nullcontext():
                yield rendezvous
            dist.barrier()
        except BaseException:
            _leave_after_error(rendezvous)
            raise
        dist.destroy_process_group()
    finally:
        torch.set_num_threads(threads_before)


def refuse_together(error: ValueError | OSError) -> None:
    """Before the world has met: raises MeetingError on every rank if this one cannot go on. A world of one returns."""
    if own_place().world_size > 1:
        with world(device="cpu", problem=str(error)):
            raise AssertionError("ranks do not meet where one has a problem")


def _with_device(place: Place, environ: Mapping[str, str], device: Literal["auto", "cpu", "cuda"]) -> Rendezvous:
    num_devices = 0 if device == "cpu" else torch.cuda.device_count()
    if device == "cuda" and not num_devices:
        raise ValueError(
            "device is 'cuda', but torch finds no CUDA device; use 'cpu', or install a CUDA build of torch"
        )
    if device == "auto" and num_devices < place.local_world_size and not has_own_device(environ, place, num_devices):
        num_devices = 0
    return on_device(place, environ, num_devices)


def _wait_for_name(rendezvous: Rendezvous) -> None:
    """Raises RendezvousError if the name of the host where the ranks meet leads nowhere; it may come a little late."""
    deadline = time.monotonic() + NAME_PATIENCE_S
    while True:
        try:
            socket.getaddrinfo(rendezvous.host, rendezvous.port)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RendezvousError(
                    f"rank {rendezvous.rank} of {rendezvous.world_size} on {socket.gethostname()} does not know the "
                    f"host {rendezvous.host}, where the ranks are to meet ({error.strerror}); set MASTER_ADDR to an "
                    "address of the host of rank 0 that every host can reach"
                ) from None
        time.sleep(0.5)


def _device_id(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


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
            f"{where} cannot listen on {rendezvous.address}: the port is in use; choose another with MASTER_PORT "
            "(--nproc: --port, torchrun and deepspeed: --master_port), or leave it out"
        )
    if "connectfullmesh" in text.lower():
        return (
            f"{where} cannot reach another rank ({first_line}); if a host's name resolves to an address that other "
            "hosts cannot reach, set run.network_interface to the network interface between them"
        )
    if isinstance(error, TimeoutError) or "timed out" in text.lower() or "timeout" in text.lower():
        return (
            f"{where} waited {timeout_s:g} s at {rendezvous.address} for rank 0; look at what that says, check that "
            "all were started with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE and no firewall stands between "
            "the hosts, or raise run.rendezvous_timeout_s"
        )
    return f"{where} could not join the others at {rendezvous.address}: {first_line}"
