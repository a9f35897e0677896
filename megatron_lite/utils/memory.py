"""How much memory this process has held, how much it may hold, and how numbers of bytes are written."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

STATUS = Path("/proc/self/status")
CGROUP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
RETURNED_FROM_BYTES = 1 << 20
_M_MMAP_THRESHOLD = -3  # malloc.h
UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
DECIMAL_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class MemoryLimit:
    """The most that a process may hold. source: what says so, in words. used_bytes: what it holds of that now."""

    num_bytes: int
    source: str
    used_bytes: int = field(default=0, compare=False)

    @property
    def left_bytes(self) -> int:
        return self.num_bytes - self.used_bytes


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that this process has held so far, bytes: on CUDA what torch has allocated, else what is resident.

    On Linux that is VmHWM: ru_maxrss begins with what the parent had held when it started this process.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    if (found := _status_bytes("VmHWM")) is not None:
        return found
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status_bytes(what: str) -> int | None:
    """A line of what Linux says of this process; None where it says nothing."""
    found = re.search(rf"^{what}:\s*(\d+) kB$", STATUS.read_text(), re.MULTILINE) if STATUS.exists() else None
    return None if found is None else int(found[1]) * 1024


def return_freed_memory() -> None:
    """From now on large blocks of main memory go back to the system as they are freed. Where that is known: glibc.

    Otherwise glibc raises the size from which a block is one of its own (up to 32 MiB) as such blocks are freed, and
    places them between smaller ones, in an arena for each thread: a process that makes and frees whole units of a model
    then holds several times what it uses. It costs page faults. (mallopt(3), M_MMAP_THRESHOLD)
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, RETURNED_FROM_BYTES)


def memory_limit() -> MemoryLimit | None:
    """The tightest limit on the main memory of this process, None where there is none.

    Of `ulimit -v` (RLIMIT_AS: addresses, which are more than what is in use), `ulimit -d` (RLIMIT_DATA), and memory.max
    of the cgroups (version 2) that it is in, which processes share.
    """
    limits = [*_resource_limits(), *_cgroup_limits()]
    return min(limits, key=lambda limit: limit.left_bytes, default=None)


def _resource_limits() -> Iterator[MemoryLimit]:
    limits = (("ulimit -v", resource.RLIMIT_AS, "VmSize"), ("ulimit -d", resource.RLIMIT_DATA, "VmData"))
    for source, which, used in limits:
        soft, _ = resource.getrlimit(which)
        if soft != resource.RLIM_INFINITY:
            yield MemoryLimit(soft, source, _status_bytes(used) or 0)


def _cgroup_limits() -> Iterator[MemoryLimit]:
    try:
        found = re.search(r"^0::/(.*)$", CGROUP.read_text(), re.MULTILINE)
    except OSError:
        return
    if found is None:
        return
    own = CGROUPS / found[1]
    for group in (own, *own.parents):
        try:
            text = (group / "memory.max").read_text().strip()
        except OSError:  # the root has none, and a container may not see its own
            continue
        if text.isdigit():
            yield MemoryLimit(int(text), f"memory.max of the cgroup {group}", _status_bytes("RssAnon") or 0)
        if group == CGROUPS:
            return


def parse_bytes(text: str) -> int:
    """'80GiB', '1.5 TB' or '1048576' as bytes. Raises ValueError for anything else."""
    units = UNITS | DECIMAL_UNITS
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = next((factor for name, factor in units.items() if found and name.lower() == (found[2] or "B").lower()), None)
    if found is None or unit is None:
        raise ValueError(f"{text!r} is no number of bytes; write it as 80GiB, with one of {', '.join(units)}")
    return int(float(found[1]) * unit)


def readable_bytes(num_bytes: int) -> str:
    """Three digits and a unit: 1.25 GiB."""
    unit = next((name for name in reversed(UNITS) if num_bytes >= UNITS[name]), "B")
    value = num_bytes / UNITS[unit]
    digits = 0 if unit == "B" else max(0, 2 - (value >= 10) - (value >= 100))
    return f"{value:,.{digits}f} {unit}"
