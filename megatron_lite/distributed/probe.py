"""How fast ranks reach one another: all-reduces over each axis of a mesh, and messages between each pair of hosts.

Bandwidths are in bytes a second. That of an all-reduce is its bus bandwidth, 2 (n - 1) / n of the buffer over the
time: what each of n ranks has to send, whatever the algorithm, so that groups of different sizes compare (as NVIDIA's
nccl-tests define it). Each figure is the best of a few rounds: what else uses a machine can only make one slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from megatron_lite.distributed import collectives
from megatron_lite.distributed.mesh import Axis, Mesh

SMALL_ELEMENTS = 1  # fp32
SMALL_ROUNDS, LARGE_ROUNDS = 20, 3
# Long enough that the latency does not count, short enough for a doctor: 0.1 s at 1 Gb/s and at 20 GB/s.
ALL_REDUCE_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
MESSAGE_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}


@dataclass(frozen=True)
class GroupSpeed:
    """An all-reduce over one group of ranks, while every other group of the same axis does the same."""

    ranks: tuple[int, ...]
    latency_s: float
    bus_bytes_per_s: float


@dataclass(frozen=True)
class LinkSpeed:
    """Messages from one host to another. latency_s: one way, half of there and back."""

    sender: str
    receiver: str
    latency_s: float
    bytes_per_s: float


def axis_speeds(mesh: Mesh, axis: Axis) -> list[GroupSpeed]:
    """Every group of the axis, in order of its first rank. Every rank calls it, and has all of the answer.

    None of an axis of size 1.
    """
    if axis.size == 1:
        return []
    small = torch.zeros(SMALL_ELEMENTS, device=mesh.device)
    num_bytes = ALL_REDUCE_BYTES[mesh.device.type]
    large = torch.zeros(num_bytes // small.element_size(), device=mesh.device)
    latency = _timed(lambda: collectives.all_reduce(small, axis), mesh, SMALL_ROUNDS)
    seconds = _timed(lambda: collectives.all_reduce(large, axis), mesh, LARGE_ROUNDS)
    rounds_of_rank = collectives.gather_objects((tuple(axis.ranks), latency, seconds), mesh.world)
    rounds_of_group: dict[tuple[int, ...], list[tuple[Sequence[float], Sequence[float]]]] = {}
    for ranks, small_s, large_s in rounds_of_rank:
        rounds_of_group.setdefault(ranks, []).append((small_s, large_s))
    speeds = []
    for members, rounds in rounds_of_group.items():
        sent_bytes = 2 * (len(members) - 1) / len(members) * num_bytes
        large_s = _best(large_s for _, large_s in rounds)
        speeds.append(GroupSpeed(members, _best(small_s for small_s, _ in rounds), sent_bytes / large_s))
    return speeds


def _best(rounds_of_members: Iterable[Sequence[float]]) -> float:
    """The seconds of the quickest round, which is over when its last member is through."""
    return min(max(round_s) for round_s in zip(*rounds_of_members, strict=True))


def _timed(action: Callable[[], object], mesh: Mesh, rounds: int) -> list[float]:
    """Seconds of each round on this rank. All ranks begin one together; a first one, which connects, is left out."""
    seconds = []
    for _ in range(rounds + 1):
        collectives.barrier(mesh.world)
        _finish(mesh)
        began = time.perf_counter()
        action()
        _finish(mesh)
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def _finish(mesh: Mesh) -> None:
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)


def tournament(num_players: int) -> list[list[tuple[int, int]]]:
    """Rounds in which every player meets every other once, and nobody two at a time: the circle method, one stays and
    the others move on by one."""
    players: list[int | None] = list(range(num_players))
    if num_players % 2:
        players.append(None)  # whoever meets it has a rest
    rounds = []
    for _ in range(len(players) - 1):
        half = len(players) // 2
        pairs = zip(players[:half], reversed(players[half:]), strict=True)
        rounds.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        players = [players[0], players[-1], *players[1:-1]]
    return rounds


def link_speeds(mesh: Mesh, host_of_rank: Sequence[str]) -> list[LinkSpeed]:
    """Both directions of each pair of hosts, between the first rank on each. Every rank calls it, and has all of it.

    Pairs that share no host are measured at the same time.
    """
    leaders = {host: host_of_rank.index(host) for host in dict.fromkeys(host_of_rank)}
    names, ranks = list(leaders), list(leaders.values())
    own: list[LinkSpeed] = []
    for pairs in tournament(len(names)):
        for is_return in (False, True):
            collectives.barrier(mesh.world)
            for first, second in pairs:
                sender, receiver = (second, first) if is_return else (first, second)
                if mesh.rank in (ranks[sender], ranks[receiver]):
                    latency, bytes_per_s = _measure_link(mesh, ranks[sender], ranks[receiver])
                    if mesh.rank == ranks[sender]:
                        own.append(LinkSpeed(names[sender], names[receiver], latency, bytes_per_s))
    return [speed for speeds in collectives.gather_objects(own, mesh.world) for speed in speeds]


def _measure_link(mesh: Mesh, sender: int, receiver: int) -> tuple[float, float]:
    """One-way seconds of a small message, and bytes a second of large ones: the sender's figures."""
    small = torch.zeros(SMALL_ELEMENTS, device=mesh.device)
    num_bytes = MESSAGE_BYTES[mesh.device.type]
    large = torch.zeros(num_bytes // small.element_size(), device=mesh.device)

    def there_and_back(message: torch.Tensor) -> float:
        began = time.perf_counter()
        if mesh.rank == sender:
            collectives.start_send(message, mesh.world, receiver).wait()
            collectives.start_receive(small, mesh.world, receiver).wait()
        else:
            collectives.start_receive(message, mesh.world, sender).wait()
            collectives.start_send(small, mesh.world, sender).wait()
        _finish(mesh)
        return time.perf_counter() - began

    there_and_back(small)  # connects
    answer = min(there_and_back(small) for _ in range(SMALL_ROUNDS))
    seconds = min(there_and_back(large) for _ in range(LARGE_ROUNDS))
    return answer / 2, num_bytes / max(seconds - answer / 2, 1e-9)
