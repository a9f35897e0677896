"""The first words between ranks, through the store that they share: who is there, and whether all mean the same run.

Every rank lays down its facts; the first reads them all, finds the verdict, and lays that down for all: one message a
rank each way, at any number of them. A rank that cannot take part comes too, and says why, so that nobody waits for it.
"""

from __future__ import annotations

import hashlib
import json
import platform
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch

import megatron_lite
from megatron_lite.distributed.environments import Place
from megatron_lite.distributed.faults import MOST_SHOWN, in_words
from megatron_lite.distributed.hosts import loopback_name

# How much longer than the first rank the others wait, so that they hear from it who did not come.
PATIENCE_S = 10.0


class MeetingError(ValueError):
    """The ranks do not mean the same run, or one cannot take part. Every rank raises it, with the same message."""

    is_agreed = True


class Store(Protocol):
    """What is used of `torch.distributed.Store`."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...
    def check(self, keys: list[str]) -> bool: ...
    def add(self, key: str, amount: int) -> int: ...
    def wait(self, keys: list[str], timeout: timedelta) -> None: ...


@dataclass(frozen=True)
class Facts:
    """What a rank says of itself.

    host: its name for people. machine: the same for ranks on one host. loopback: the address that gloo would give to
    the others, if they cannot reach it. device: its kind; own_device: which one it is, if no other rank may have it.
    digest: of the settings that all ranks have to share. problem: why it cannot take part. world_size: of the world
    that it means.
    """

    host: str
    machine: str
    world_size: int = 0
    loopback: str = ""
    device: str = "cpu"
    own_device: str = ""
    attempt: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    digest: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Met:
    """What all ranks know once they have met. attempt: the largest that a launcher has told any of them."""

    num_hosts: int
    attempt: int
    world_size: int
    problem: str = ""


def facts_of(place: Place, *, device: str, own_device: str, settings: Mapping[str, Any], problem: str) -> Facts:
    host = socket.gethostname()
    return Facts(
        host=place.node or host,
        machine=host,
        world_size=place.world_size,
        loopback=loopback_name(),
        device=device,
        own_device=own_device,
        attempt=place.attempt,
        versions=versions(),
        digest=hashlib.sha256(_as_json(settings).encode()).hexdigest(),
        problem=problem,
    )


def versions() -> dict[str, str]:
    """Of what has to be the same on every host. Releases of one version of Python are."""
    sources = hashlib.sha256()
    package = Path(megatron_lite.__file__).parent
    for path in sorted(package.rglob("*.py")):
        sources.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return {
        "megatron_lite": f"{megatron_lite.__version__} of sources {sources.hexdigest()[:8]}",
        "torch": torch.__version__,
        "Python": ".".join(platform.python_version_tuple()[:2]),
    }


def meet(store: Store, place: Place, facts: Facts, settings: Mapping[str, Any], timeout_s: float) -> Met:
    """Lays down this rank's facts and returns what all of them know. Every rank calls it.

    Raises MeetingError on every rank that is there: `timeout_s` is over before all have come, or their facts do not
    agree.
    """
    store.set(f"settings/{place.rank}", _as_json(settings))
    store.set(f"facts/{place.rank}", json.dumps(asdict(facts)))
    if place.rank == 0:
        met = _judge(store, place, timeout_s)
        store.set("met", json.dumps(asdict(met)))
    else:
        store.wait(["met"], timedelta(seconds=timeout_s + PATIENCE_S))
        met = Met(**json.loads(store.get("met")))
        if met.world_size != place.world_size:  # of which rank 0 need not know
            raise ValueError(_another_world(place.rank, facts, met.world_size))
    if met.problem:
        _leave_together(store, place)
        raise MeetingError(met.problem)
    return met


def _judge(store: Store, place: Place, timeout_s: float) -> Met:
    keys = [f"facts/{rank}" for rank in range(place.world_size)]
    if not _have_come(store, keys, timeout_s):
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        if missing:
            return Met(0, 0, place.world_size, _who_is_missing(place, missing, timeout_s))
    facts = [Facts(**json.loads(text)) for text in store.multi_get(keys)]
    size = place.world_size
    other = next((rank for rank, one in enumerate(facts) if one.world_size != size), None)
    problem = "" if other is None else _another_world(other, facts[other], size)
    problem = problem or _problem_of_one(facts) or _differing_device(facts) or _unreachable(facts)
    problem = problem or _differing_run(facts, store)
    num_hosts = len({(one.host, one.machine) for one in facts})
    return Met(num_hosts, max(one.attempt for one in facts), place.world_size, problem)


def _have_come(store: Store, keys: list[str], timeout_s: float) -> bool:
    try:
        store.wait(keys, timedelta(seconds=timeout_s))
    except RuntimeError:  # torch's own errors of a store are among them
        return False
    return True


def _leave_together(store: Store, place: Place) -> None:
    """The first rank may serve the store, and so goes last."""
    num_left = store.add("left", 1)
    deadline = time.monotonic() + PATIENCE_S
    while place.rank == 0 and num_left < place.world_size and time.monotonic() < deadline:
        time.sleep(0.05)
        num_left = store.add("left", 0)


def _another_world(rank: int, facts: Facts, world_size: int) -> str:
    return (
        f"rank {rank} on {facts.host} means a world of {facts.world_size} ranks, and rank 0 one of {world_size}; start "
        "all ranks with the same WORLD_SIZE, or the same hosts"
    )


def _who_is_missing(place: Place, missing: Sequence[int], timeout_s: float) -> str:
    return (
        f"rank 0 of {place.world_size} waited {timeout_s:g} s at {place.address} for {in_words(missing)}; look at what "
        "they say, check that all were started with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE and that no "
        "firewall stands between the hosts, or raise run.rendezvous_timeout_s"
    )


def _problem_of_one(facts: Sequence[Facts]) -> str:
    others = [rank for rank, one in enumerate(facts) if one.problem]
    if not others:
        return ""
    first = facts[others[0]]
    if all(one.problem == first.problem for one in facts):
        return first.problem
    more = f" ({in_words(others[1:])} too)" if len(others) > 1 else ""
    return f"rank {others[0]} on {first.host}{more}: {first.problem}"


def _differing_device(facts: Sequence[Facts]) -> str:
    """Each rank looks only at its own host: on a mixed cluster some would wait on gloo for others that are on NCCL."""
    for rank, one in enumerate(facts):
        if one.device != facts[0].device:
            return (
                f"rank 0 computes on {facts[0].device} and rank {rank} on {one.device}; start the ranks on hosts that "
                "have a GPU for each of them, or set run.device=cpu"
            )
    owners = dict[tuple[str, str], int]()
    for rank, one in enumerate(facts):
        owner = owners.setdefault((one.machine, one.own_device), rank)
        if one.own_device and owner != rank:
            return (
                f"ranks {owner} and {rank} on {one.host} have the same GPU, {one.own_device}; give each rank one "
                "(srun --gpus-per-task=1), or show every rank all of its host's"
            )
    return ""


def _unreachable(facts: Sequence[Facts]) -> str:
    if len({one.machine for one in facts}) == 1:
        return ""
    for rank, one in enumerate(facts):
        if one.loopback:
            return (
                f"the name of host {one.machine} (rank {rank}) leads to {one.loopback}, where no other host can reach "
                f"it: set run.network_interface to the interface between the hosts, or correct /etc/hosts there"
            )
    return ""


def _differing_run(facts: Sequence[Facts], store: Store) -> str:
    """Which rank differs from the first one, in which versions and settings."""
    others = [
        rank for rank, one in enumerate(facts) if (one.versions, one.digest) != (facts[0].versions, facts[0].digest)
    ]
    if not others:
        return ""
    rank = others[0]
    before, after = ({**facts[one].versions, **json.loads(store.get(f"settings/{one}"))} for one in (0, rank))
    keys = [key for key in dict.fromkeys((*before, *after)) if before.get(key) != after.get(key)]
    shown = [f"{key} ({_shown(after.get(key))}, not {_shown(before.get(key))})" for key in keys[:MOST_SHOWN]]
    more = f" and {len(keys) - MOST_SHOWN} more" if len(keys) > MOST_SHOWN else ""
    too = f", and {in_words(others[1:])} too" if len(others) > 1 else ""
    return (
        f"rank {rank} on {facts[rank].host} differs from rank 0 on {facts[0].host} in {', '.join(shown)}{more}{too}; "
        "start every rank from the same files, with the same arguments"
    )


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _as_json(settings: Mapping[str, Any]) -> str:
    return json.dumps(dict(settings), sort_keys=True)
