"""Slow and failing disks, and processes that end badly: what the tests of offloaded state have in common."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable

import torch
from torch import Tensor

NUMEL = 3000


def values(numel: int = NUMEL, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)).to(dtype)


def failing(code: int) -> Callable[[], None]:
    """Raises the error of the system with this number."""

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    return fail


def sleepy(seed: int) -> Callable[[], None]:
    """Sleeps a little, and sometimes so long that many others pass by."""
    draw = random.Random(seed)
    return lambda: time.sleep(0.01 if draw.random() < 0.05 else draw.random() * 0.001)


def run_python(code: str, *arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
