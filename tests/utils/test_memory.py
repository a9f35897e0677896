"""The peak is that of this process alone, whatever started it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_lite.utils import memory
from tests.ops.oracle import ROOT

PARENT_BYTES = 1 << 30
CHILD = """
import resource, torch
from megatron_lite.utils.memory import peak_memory_bytes
peak = lambda: peak_memory_bytes(torch.device("cpu"))
before = peak()
held = bytearray(64 << 20)
print(before, peak(), 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
PARENT = f"""
import subprocess, sys
held = bytearray(b"x") * {PARENT_BYTES}
subprocess.run([sys.executable, "-c", {CHILD!r}], check=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is ru_maxrss alone")
def test_the_peak_of_the_parent_is_not_counted() -> None:
    done = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, cwd=ROOT, check=True)
    before, after, inherited = map(int, done.stdout.split())
    assert inherited >= PARENT_BYTES, "the parent's peak does not reach the child: nothing is checked"
    assert before < PARENT_BYTES and after - before >= 60 << 20


def test_without_proc_it_is_what_the_system_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    resident = memory.peak_memory_bytes(torch.device("cpu"))
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    assert memory.peak_memory_bytes(torch.device("cpu")) >= 0.9 * resident > 1 << 26  # the two are counted apart
