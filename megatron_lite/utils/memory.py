"""How much memory this process has held."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that this process has held so far, bytes: on CUDA what torch has allocated, else what is resident.

    On Linux that is VmHWM: ru_maxrss begins with what the parent had held when it started this process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = re.search(r"^VmHWM:\s*(\d+) kB$", STATUS.read_text(), re.MULTILINE) if STATUS.exists() else None
    if found is not None:
        return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
