"""What there is on this host: the lines that each host of a world adds to the report, and the sections of one alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from megatron_lite.cli.doctor.host import Wanted, host_lines
from megatron_lite.cli.doctor.kernels import kernels, kernels_of_config
from megatron_lite.cli.doctor.network import Connected, chosen_of, network_lines
from megatron_lite.cli.doctor.report import Line, Section, Verdict, of_hosts, of_lines
from megatron_lite.cli.doctor.request import Request
from megatron_lite.distributed.hosts import interfaces

if TYPE_CHECKING:
    from megatron_lite.config.schema import RunConfig

Lines = dict[str, Sequence[Line]]


def lines_here(
    request: Request, *, ranks_here: int = 1, world_size: int = 1, chosen: str = "", is_bound: bool = False
) -> Lines:
    """Section -> lines of this host. chosen: what the environment says of the network interface; the config wins.
    is_bound: see `Wanted`."""
    config, cluster = request.load_config(), request.load_cluster()
    named = None if config is None else config.run.network_interface
    connected = Connected(
        chosen=(named if named is not None else chosen_of(chosen, interfaces())),
        pattern=cluster.network_interface or "" if cluster is not None else "",
        has_peers=world_size > ranks_here,
    )
    wanted = Wanted(cluster, folders_of(config), ranks_here, world_size, is_bound)
    return {
        "environment": environment_lines(),
        "host": host_lines(wanted),
        "network": network_lines(connected),
    }


def folders_of(config: RunConfig | None) -> tuple[tuple[str, str], ...]:
    """Key -> folder, of those that a run writes to; without a config, that of run.dir by default."""
    if config is None:
        from megatron_lite.config import RunSettings

        return (("run.dir", RunSettings().dir),)
    found = (("run.dir", config.run.dir), ("offload.dir", config.offload.dir))
    return tuple((key, folder) for key, folder in found if folder is not None)


def environment_lines() -> list[Line]:
    """What is installed and built; red is what a defect is about, yellow what is not there and would be of use."""
    from megatron_lite.ops import survey

    defects = [defect.rpartition("and yet: ")[2] for defect in survey.defects()]
    lacking, lines = survey.lacking(), []
    for part, state in survey.environment().items():
        found, _, remedy = state.partition("; ")
        is_defect = any(defect in state for defect in defects)
        if is_defect:
            lines.append(Line(part, found, Verdict.red, remedy or "reinstall"))
        elif part in lacking:
            lines.append(Line(part, found, Verdict.yellow, remedy or "reinstall"))
        else:
            lines.append(Line(part, state))
    return lines


def sections_here(request: Request, lines: Lines) -> list[Section]:
    """Everything about this host, in the order in which it is shown."""
    environment, *others = (of_lines(name, of_name) for name, of_name in lines.items())
    return [environment, *kernel_sections(request), *others]


def sections_of_hosts(request: Request, lines_of_host: Mapping[str, Lines]) -> list[Section]:
    """The same for several hosts; the kernels are those of this one."""
    names = next(iter(lines_of_host.values()))
    environment, *others = (of_hosts(name, {host: of[name] for host, of in lines_of_host.items()}) for name in names)
    return [environment, *kernel_sections(request), *others]


def kernel_sections(request: Request) -> list[Section]:
    of_config = kernels_of_config(request)
    return [kernels(request), *([] if of_config is None else [of_config])]


def to_json(lines: Lines) -> str:
    return json.dumps({name: [asdict(line) for line in of_name] for name, of_name in lines.items()})


def from_json(text: str) -> Lines:
    def line(check: str, found: str, verdict: str, remedy: str) -> Line:
        return Line(check, found, Verdict(verdict), remedy)

    return {name: [line(**fields) for fields in of_name] for name, of_name in json.loads(text).items()}
