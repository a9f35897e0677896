"""Host files as MPI and DeepSpeed read them: a host a line, with the number of processes that it takes."""

from __future__ import annotations

import difflib
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

EXAMPLE = "node1 slots=8"


@dataclass(frozen=True)
class Host:
    """slots: processes that it takes."""

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a file, in order. Raises ValueError with the line that is wrong, OSError if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [one.name for one in path.parent.glob("*")], n=1)
        hint = f"did you mean {path.with_name(near[0])}? " if near else ""
        raise ValueError(
            f"--hostfile {path}: there is no such file; {hint}write a line for each host: {EXAMPLE}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--hostfile {path}: cannot be read: {error}") from None
    found: dict[str, Host] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].strip()
        if not words:
            continue
        match = re.fullmatch(r"(\S+)(?:\s+slots\s*=\s*(\d+))?", words)
        if match is None or match[2] == "0":
            raise ValueError(f"--hostfile {path}:{number}: {words!r} is not understood; write {EXAMPLE}")
        if match[1] in found:
            raise ValueError(
                f"--hostfile {path}:{number}: {match[1]} is there twice; give it one line with all its slots"
            )
        found[match[1]] = Host(match[1], int(match[2] or 1))
    if not found:
        raise ValueError(f"--hostfile {path}: names no host; write a line for each: {EXAMPLE}")
    return list(found.values())


def check_hosts(path: Path, hosts: Sequence[Host], nodes: int, ranks_per_node: int) -> list[Host]:
    """The first `nodes` of the hosts. Raises ValueError if there are fewer, one has too few slots, or leads nowhere."""
    if len(hosts) < nodes:
        raise ValueError(
            f"--nodes is {nodes}, and {path} has {len(hosts)}: {', '.join(host.name for host in hosts)}; name more "
            f"hosts there, or give --nodes {len(hosts)}"
        )
    taken = list(hosts[:nodes])
    for host in taken:
        if host.slots < ranks_per_node:
            raise ValueError(
                f"--nproc-per-node is {ranks_per_node}, and {path} gives {host.name} {host.slots} "
                f"slot{'' if host.slots == 1 else 's'}; give it slots={ranks_per_node} if it has as many GPUs or "
                f"cores, or --nproc-per-node {min(one.slots for one in taken)}"
            )
    for host in taken:
        try:
            socket.getaddrinfo(host.name, None)
        except OSError as error:
            raise ValueError(
                f"{path}: {host.name}: {error.strerror}; correct the name, or give it an address in /etc/hosts or DNS"
            ) from None
    return taken
