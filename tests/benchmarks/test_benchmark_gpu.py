"""What benchmarks/gpu.sh does with a GPU is tried on the CPU, small; and that one failure leaves the others alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu
from tests.ops.emulation import build
from tests.ops.oracle import ROOT


def test_the_parts_that_a_cpu_can_run(tmp_path: Path) -> None:
    parts = ["environment", "build", "ceilings", "training"]
    command = ["bash", "benchmarks/gpu.sh", "--smoke", "--out", str(tmp_path), "--only", *parts]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert set(report["parts"]) == set(parts) and report["failures"] == [] and report["smoke"] is True
    assert report["parts"]["ceilings"]["result"]["copy_bytes_per_s"] > 1e8
    assert report["parts"]["training"]["result"]["tokens_per_s"] > 0
    assert "tokens/s, MFU" in (tmp_path / "gpu.md").read_text()


@pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))
def test_the_numbers_of_the_cuda_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "case_names", lambda folder: ["rms_norm", "nothing"])
    session = gpu.Session(tmp_path, True, time.monotonic() + 100)
    report = {"parts": {"cuda_numbers": gpu.attempt(lambda: gpu.cuda_numbers(session))}}
    caught, wrong, _ = json.loads(report["parts"]["cuda_numbers"]["result"]["rms_norm"]["result"])
    assert caught == wrong > 0
    (failure,) = gpu.failures_of(report)
    assert failure.startswith("cuda_numbers/nothing: exit code 1")


def test_a_part_that_fails_or_takes_too_long_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {
        "build": lambda session: session.python("-c", "raise SystemExit('no compiler')", limit_s=20),
        # The child of the one that is cut off holds its pipes.
        "ceilings": lambda session: session.run(["bash", "-c", "sleep 60 & sleep 60"], limit_s=2),
        "kernels": lambda session: 1 / 0,
        "training": lambda session: session.run(["/nowhere/tool"], limit_s=5),
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [state["ok"] for state in report["parts"].values()] == [False] * 4
    assert "no compiler" in report["parts"]["build"]["error"]
    page = (tmp_path / "gpu.md").read_text()
    for words in (
        "build: exit code 1",
        "ceilings: cut off after 2 s",
        "ZeroDivisionError",
        "/nowhere/tool does not run",
    ):
        assert words in page
    assert page.strip() in capsys.readouterr().out


def test_without_time_nothing_is_started(tmp_path: Path) -> None:
    session = gpu.Session(tmp_path, True, time.monotonic())
    assert "the time of the whole run is up" in gpu.attempt(lambda: gpu.environment(session))["error"]


def test_the_table_has_the_kernels() -> None:
    case = {"op": "rms_norm", "label": "8 x 8", "dtype": "bf16", "bytes_moved": 10**9, "flops": 0, "failed": {}}
    stopped = {"stopped": "cut off after 45 s\nand more"}
    timed = {**case, "failed": {"cuDNN": "no kernel"}, "seconds": {"ours": [0.001], "F.rms_norm": [0.002]}}
    parts = {
        "ceilings": {"ok": True, "result": {"copy_bytes_per_s": 2e12, "matmul_flops_per_s": {"bf16": 5e14}}},
        "kernels": {"ok": True, "result": {"rms_norm": {"ok": True, "result": [timed, stopped]}}},
    }
    page = gpu.table_of({"date": "today", "parts": parts})
    row = (
        "| rms_norm | 8 x 8 | bf16 | ours | 1.00 | F.rms_norm 2.00, cuDNN did not run | 2.00 | 1000.0 GB/s | copy 50% |"
    )
    assert row in page
    assert "failed: kernels/rms_norm: cuDNN: no kernel" in page
    assert "failed: kernels/rms_norm: cut off after 45 s" in page
    assert "matmul bf16 500.00 TFLOP/s" in page


def test_every_op_on_cuda_is_in_the_parts() -> None:
    for folder in ("tests/ops/cuda_cases", "tests/ops/triton_cases", "benchmarks/kernel_cases"):
        assert "rms_norm" in gpu.case_names(folder)
