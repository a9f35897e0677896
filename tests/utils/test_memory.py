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


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("80GiB", 80 << 30), ("80 gib", 80 << 30), ("1.5TB", 1_500_000_000_000), ("1048576", 1 << 20), ("512B", 512)],
)
def test_numbers_of_bytes(text: str, num_bytes: int) -> None:
    assert memory.parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "80 apples", "-1GiB", "1e9"])
def test_what_is_no_number_of_bytes(text: str) -> None:
    with pytest.raises(ValueError, match="write it as 80GiB"):
        memory.parse_bytes(text)


def test_three_digits() -> None:
    sizes = (0, 17, 1023, 1024, 1234567890, 80 << 30, 1000 << 30)
    written = ["0 B", "17 B", "1,023 B", "1.00 KiB", "1.15 GiB", "80.0 GiB", "1,000 GiB"]
    assert [memory.readable_bytes(size) for size in sizes] == written


def test_the_tightest_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a group and of those that it is in; a group without a limit says max."""
    inner = tmp_path / "groups/outer/inner"
    inner.mkdir(parents=True)
    (tmp_path / "own").write_text("12:cpu:/elsewhere\n0::/outer/inner\n")
    (inner / "memory.max").write_text("max\n")
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "own")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory.resource, "getrlimit", lambda which: (memory.resource.RLIM_INFINITY,) * 2)
    assert memory.memory_limit() is None
    (inner.parent / "memory.max").write_text(f"{5 << 30}\n")
    limit = memory.memory_limit()
    assert limit is not None and limit.num_bytes == 5 << 30 and limit.source.endswith("outer")
    (inner / "memory.max").write_text(f"{3 << 30}\n")
    assert memory.memory_limit() == memory.MemoryLimit(3 << 30, f"memory.max of the cgroup {inner}")
    data = {memory.resource.RLIMIT_DATA: (1 << 30, 2 << 30)}
    unlimited = (memory.resource.RLIM_INFINITY,) * 2
    monkeypatch.setattr(memory.resource, "getrlimit", lambda which: data.get(which, unlimited))
    assert memory.memory_limit() == memory.MemoryLimit(1 << 30, "ulimit -d")


def test_without_cgroups_there_is_no_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "none")
    monkeypatch.setattr(memory.resource, "getrlimit", lambda which: (memory.resource.RLIM_INFINITY,) * 2)
    assert memory.memory_limit() is None
