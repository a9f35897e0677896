"""The doctor as ranks of a world: every host says what it has, and all of them measure how fast they reach one another.

Hosts lay down what they found in the store that the ranks share before any of them depends on the network, so that the
report has it where the ranks then do not find one another, and says why.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_lite.cli.doctor.here import Lines, from_json, lines_here, sections_here, sections_of_hosts, to_json
from megatron_lite.cli.doctor.report import Line, Section, Verdict, of_lines, print_report
from megatron_lite.cli.doctor.request import Request
from megatron_lite.cli.doctor.world import axes_section, links_section
from megatron_lite.distributed import collectives, hosts
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.probe import axis_speeds, link_speeds
from megatron_lite.distributed.rendezvous import Rendezvous, world
from megatron_lite.distributed.topology import AXES, Layout

if TYPE_CHECKING:
    from megatron_lite.distributed.meeting import Store

# What a rank says where another one speaks for the host.
NOT_THE_FIRST_HERE = "-"
# Launchers that give each rank cores of its own.
BINDS = ("srun", "mpirun")


class Hosts:
    """What the hosts of the world say of themselves. Every rank calls it with the store; the first one collects."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._store: Store | None = None
        self.place: Rendezvous | None = None

    def __call__(self, store: Store, place: Rendezvous) -> None:
        self._store, self.place = store, place
        said = NOT_THE_FIRST_HERE
        if place.local_rank == 0:
            lines = lines_here(
                self._request,
                ranks_here=place.local_world_size,
                world_size=place.world_size,
                chosen=hosts.chosen_interface(place.backend),
                is_bound=place.launcher in BINDS,
            )
            said = f"{host_of(place)} {to_json(lines)}"
        store.set(_key(place.rank), said)

    def collect(self) -> dict[str, Lines]:
        """Host -> its lines, of the hosts that have come: after the ranks have met, or could not."""
        if self._store is None or self.place is None:
            return {}
        keys = [key for rank in range(self.place.world_size) if self._store.check([key := _key(rank)])]
        answers = (answer.decode().partition(" ") for answer in self._store.multi_get(keys))
        return {host: from_json(text) for host, _, text in answers if text}


def _key(rank: int) -> str:
    return f"host/{rank}"


def host_of(place: Rendezvous) -> str:
    """The name of this host for people: that which the launcher has for it, or its own."""
    return place.node or socket.gethostname()


def examine(request: Request) -> int:
    """Every rank calls it; the first one prints the report. Returns the exit code."""
    found = Hosts(request)
    config = request.load_config()
    measured: list[Section] = []
    try:
        with world(
            timeout_s=request.timeout_s,
            meet_timeout_s=request.timeout_s,
            device="auto" if config is None else config.run.device,
            interface=None if config is None else config.run.network_interface,
            before=found,
        ) as place:
            measured = _measure(request, place)
    except (ValueError, OSError, RuntimeError) as error:
        if found.place is None:
            raise  # this rank has nothing else to tell
        measured = [of_lines("world", [_failure(error)])]
    if found.place is not None and found.place.rank > 0:
        return 0
    lines = found.collect() or {socket.gethostname(): lines_here(request)}
    of_hosts = sections_of_hosts if len(lines) > 1 else _sections_of_one
    return print_report([*of_hosts(request, lines), *measured], as_json=request.as_json)


def _sections_of_one(request: Request, lines_of_host: dict[str, Lines]) -> list[Section]:
    return sections_here(request, next(iter(lines_of_host.values())))


def _failure(error: Exception) -> Line:
    """Errors of this package hold their remedy; those of torch are told from the ranks' own words alone."""
    text = str(error).strip().split("\n", 1)[0]
    if isinstance(error, (ValueError, OSError)):
        found, _, remedy = text.partition("; ")
        return Line("ranks", found, Verdict.red, remedy or "see above")
    remedy = "look at the host name and the interfaces above, and at firewalls between the hosts"
    return Line("ranks", text, Verdict.red, remedy)


def _measure(request: Request, place: Rendezvous) -> list[Section]:
    mesh = build_mesh(layout_of(request, place.world_size), device=place.device, timeout_s=request.timeout_s)
    host_of_rank: Sequence[str] = collectives.gather_objects(host_of(place), mesh.world)
    axes = [axis for axis in (mesh.pp, mesh.dp, mesh.cp, mesh.ep, mesh.tp) if 1 < axis.size < mesh.world.size]
    speeds = {axis.name: axis_speeds(mesh, axis) for axis in (mesh.world, *axes)}
    cluster = request.load_cluster()
    if cluster is not None and cluster.device != place.device.type:
        cluster = None  # it says nothing of what these ranks compute on
    sections = []
    if mesh.world.size > 1:
        sections.append(axes_section(speeds, host_of_rank, cluster))
    if len(set(host_of_rank)) > 1:
        sections.append(links_section(link_speeds(mesh, host_of_rank), cluster))
    return sections


def layout_of(request: Request, world_size: int) -> Layout:
    """That of --layout, or of the config, or all ranks along dp. Raises ValueError if it does not fit."""
    config = request.load_config(world_size)
    if request.layout:
        return parse_layout(request.layout, world_size)
    if config is None:
        return Layout(dp=world_size)
    parallel = config.parallel
    return Layout(pp=parallel.pp, dp=config.dp, cp=parallel.cp, tp=parallel.tp)


def parse_layout(text: str, world_size: int) -> Layout:
    """'tp=2,pp=2,dp=2'; dp may be left out. Raises ValueError for what is none, or of another size than the world."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        named = re.fullmatch(r"\s*([a-z]+)\s*=\s*([1-9]\d*)\s*", part)
        if named is None or named[1] not in AXES or named[1] in sizes:
            raise ValueError(
                f"--layout {text}: {part.strip()!r} is not understood; write tp=2,pp=2,dp=2, each axis once"
            )
        sizes[named[1]] = int(named[2])
    layout = Layout(**sizes)
    if "dp" not in sizes and world_size % layout.world_size == 0:
        layout = Layout(**sizes, dp=world_size // layout.world_size)
    if layout.world_size != world_size:
        raise ValueError(
            f"--layout {text} needs {layout.world_size} processes, and there are {world_size}; change an axis, or "
            "leave dp out"
        )
    return layout
