"""What benchmarks/gpu.sh does with a GPU is tried on the CPU, small; and that one failure leaves the others alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, gpu_session
from benchmarks.kernel_cases.case import KernelCase
from benchmarks.kernel_timing import case_modules, measure
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
    session = gpu.Session(tmp_path, True, time.monotonic() + 600)
    report = {"parts": {"cuda_numbers": gpu.attempt(lambda: gpu.cuda_numbers(session))}}
    caught, wrong = json.loads(report["parts"]["cuda_numbers"]["result"]["rms_norm"]["result"])[:2]
    assert caught == wrong > 0
    (failure,) = gpu.failures_of(report)
    assert failure.startswith("cuda_numbers/nothing: exit code 1")


@pytest.mark.parametrize("part", [gpu.cuda_numbers, gpu.triton_numbers])
def test_a_control_that_is_not_caught_is_a_failure(
    part: Callable[[gpu.Session], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    printed = {"sees_all": "a warning\n[4, 4]\n", "sees_little": '[3, 4, "digest"]\n', "checks_nothing": "[0, 0]\n"}
    monkeypatch.setattr(gpu, "case_names", lambda folder: list(printed))

    def fake(session: gpu.Session, *command: str, **options: Any) -> str:
        return next(text for op, text in printed.items() if op in command)

    monkeypatch.setattr(gpu.Session, "python", fake)
    session = gpu.Session(tmp_path, False, time.monotonic() + 100)
    report = {"parts": {"numbers": gpu.attempt(lambda: part(session))}}
    assert gpu.failures_of(report) == [
        "numbers/sees_little: only 3 of 4 deliberately wrong results were caught",
        "numbers/checks_nothing: only 0 of 0 deliberately wrong results were caught",
    ]


def part_of(function: Callable[[gpu.Session], Any], share: float = 1.0) -> tuple[Callable[[gpu.Session], Any], float]:
    return function, share


def test_a_part_that_fails_or_takes_too_long_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {
        "build": part_of(lambda session: session.python("-c", "raise SystemExit('no compiler')")),
        # The child of the one that is cut off holds its pipes.
        "ceilings": part_of(lambda session: session.run(["bash", "-c", "sleep 60 & sleep 60"], limit_s=2)),
        "kernels": part_of(lambda session: 1 / 0),
        "training": part_of(lambda session: session.run(["/nowhere/tool"])),
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [state["state"] for state in report["parts"].values()] == ["failed", "cut off", "failed", "failed"]
    assert "no compiler" in report["parts"]["build"]["error"]
    page = (tmp_path / "gpu.md").read_text()
    for words in (
        "build: exit code 1",
        "ceilings: cut off after 2 s",
        "| ceilings | cut off | 2.",
        "ZeroDivisionError",
        "/nowhere/tool does not run",
    ):
        assert words in page
    assert page.strip() in capsys.readouterr().out


def test_what_is_not_installed_is_no_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent() -> None:
        raise ImportError("no module named apex")

    def measured(ours: Callable[[], object]) -> dict[str, Any]:
        contenders = {"ours": ours, "ours, triton": lambda: None, "apex": absent, "torch": lambda: None}
        return asdict(measure(KernelCase("adamw", "64 M", "fp32", contenders, 100), "cpu", rounds=1))

    def run(case: dict[str, Any]) -> tuple[int, dict[str, Any], str]:
        kernels = {"adamw": {"ok": True, "state": "done", "result": [case]}}
        parts = {"kernels": part_of(lambda session: kernels), "memcheck": part_of(gpu.memcheck)}
        monkeypatch.setattr(gpu, "PARTS", parts)
        monkeypatch.setattr(gpu.shutil, "which", lambda tool: None)
        code = gpu.main(["--out", str(tmp_path)])
        return code, json.loads((tmp_path / "gpu.json").read_text()), (tmp_path / "gpu.md").read_text()

    code, report, page = run(measured(lambda: None))
    assert code == 0 and report["failures"] == [] and "failed:" not in page
    missing = ["kernels/adamw: apex: no module named apex", "memcheck: compute-sanitizer is not installed"]
    assert [found.partition(";")[0] for found in report["not_here"]] == missing
    assert "apex not here" in page and "not here: memcheck: compute-sanitizer" in page
    code, report, page = run(measured(absent))
    assert code == 1 and report["failures"] == ["kernels/adamw: ours: no module named apex"]
    assert "| ours | failed |" in page


def test_a_slow_part_takes_no_time_from_those_behind_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nap = ["sleep", "60"]
    quick = part_of(lambda session: session.left())
    parts = {"build": part_of(lambda session: session.run(nap)), "ceilings": quick, "kernels": quick}
    monkeypatch.setattr(gpu, "PARTS", parts)
    assert gpu.main(["--out", str(tmp_path), "--limit", "6"]) == 1
    states = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert states["build"]["state"] == "cut off" and states["build"]["allowed_s"] == pytest.approx(2, abs=0.2)
    assert 1 < states["ceilings"]["result"] <= 2.2 and states["ceilings"]["state"] == "done"
    assert 3 < states["kernels"]["result"] <= 4.2, "what ceilings left is there for kernels"


def test_an_op_that_hangs_takes_no_time_from_the_others(tmp_path: Path) -> None:
    session = gpu.Session(tmp_path, True, time.monotonic() + 6)
    seconds = {"hangs": "60", "quick": "0", "too": "0"}
    found = gpu_session.each(session, list(seconds), lambda op, s: session.run(["sleep", seconds[op]], limit_s=s), 1)
    assert [one["state"] for one in found.values()] == ["cut off", "done", "done"]
    assert found["hangs"]["seconds"] == pytest.approx(2, abs=0.7)


def test_a_kill_leaves_the_report_and_no_process(tmp_path: Path) -> None:
    """As `timeout` or a machine that is taken back ends it: in the middle of a part, here the second."""
    code = (
        "import sys; from benchmarks import gpu; "
        "gpu.PARTS = {'build': (lambda s: 'built', 1), 'kernels': (lambda s: s.run(['sleep', '61.375']), 1)}; "
        f"sys.exit(gpu.main(['--out', {str(tmp_path)!r}]))"
    )
    started = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None and "build: done" in started.stdout.readline()
    time.sleep(0.5)
    started.terminate()
    assert started.wait(60) == 143
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["parts"]["build"]["result"] == "built"
    assert report["parts"]["kernels"]["state"] == "cut off"
    assert "| kernels | cut off |" in (tmp_path / "gpu.md").read_text()
    commands = (path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists())
    assert not any(command == b"sleep\x0061.375\x00" for command in commands)


SIGNALLED = """
import os, signal, subprocess, sys
from benchmarks import gpu, gpu_session

class Signalled(subprocess.Popen):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        os.kill(os.getpid(), signal.SIGTERM)

gpu_session.subprocess.Popen = Signalled
parts = {{
    "alone": lambda s: s.run(["sleep", "61.625"]),
    "of several": lambda s: gpu.each(s, ["a", "b"], lambda name, limit_s: s.run(["sleep", "61.875"]), 2),
}}
gpu.PARTS = {{"build": (parts[{part!r}], 1), "kernels": (lambda s: "never", 1)}}
sys.exit(gpu.main(["--out", {out!r}]))
"""


@pytest.mark.parametrize(("part", "nap"), [("alone", b"61.625"), ("of several", b"61.875")])
def test_a_kill_while_a_process_is_started_leaves_none(part: str, nap: bytes, tmp_path: Path) -> None:
    """The signal arrives after the process was made and before anyone knows of it."""
    code = SIGNALLED.format(part=part, out=str(tmp_path))
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=50).returncode == 143
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert list(report["parts"]) == ["build"] and "when the run was ended" in json.dumps(report)
    commands = (path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists())
    assert not any(command == b"sleep\x00" + nap + b"\x00" for command in commands)


def test_a_link_to_nowhere_is_no_obstacle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "megatron_lite").mkdir()
    (tmp_path / "megatron_lite/_csrc").symlink_to("../csrc")  # and there is no csrc
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu.Session, "python", lambda session, *command: "")
    assert gpu.build(gpu.Session(tmp_path, False, time.monotonic() + 10)) == "not built"


def test_without_time_nothing_is_started(tmp_path: Path) -> None:
    session = gpu.Session(tmp_path, True, time.monotonic())
    state = gpu.attempt(lambda: gpu.environment(session))
    assert state["state"] == "cut off" and "no time was left" in state["error"]


def test_the_shares_are_of_the_whole_limit() -> None:
    assert sum(share for _, share in gpu.PARTS.values()) == gpu.parse([]).limit


def test_the_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.parse(["--help"])
    text = capsys.readouterr().out
    script = subprocess.run(["bash", "benchmarks/gpu.sh", "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    for page in (text, script):
        assert "--smoke --only" in page and "xit codes: 0 all is well" in page
        assert "2 " in page.partition("xit codes")[2] and "143 it was" in page and "SIGTERM" in page
    for name, (function, _) in gpu.PARTS.items():
        assert name in text and (function.__doc__ or "?").splitlines()[0] in text


def test_the_table_has_the_kernels() -> None:
    case = {"op": "rms_norm", "label": "8 x 8", "dtype": "bf16", "bytes_moved": 10**9, "flops": 0}
    stopped = {"stopped": "cut off after 45 s\nand more", "state": "cut off"}
    seconds = {"ours": [0.001], "F.rms_norm": [0.002]}
    timed = {**case, "failed": {"ours, cuda": "wrong"}, "not_here": {"cuDNN": "no kernel"}, "seconds": seconds}
    done = {"ok": True, "state": "done"}
    parts = {
        "ceilings": {**done, "result": {"copy_bytes_per_s": 2e12, "matmul_flops_per_s": {"bf16": 5e14}}},
        "kernels": {**done, "result": {"rms_norm": {**done, "result": [timed, stopped]}}},
    }
    page = gpu.table_of({"date": "today", "parts": parts})
    head = "| rms_norm | 8 x 8 | bf16 |"
    assert f"{head} ours | 1.00 | F.rms_norm 2.00, cuDNN not here | 2.00 | 1000.0 GB/s | copy 50% |" in page
    assert f"{head} ours, cuda | failed | F.rms_norm 2.00, cuDNN not here | - | - | - |" in page
    assert "failed: kernels/rms_norm: ours, cuda: wrong" in page
    assert "not here: kernels/rms_norm: cuDNN: no kernel" in page
    assert "failed: kernels/rms_norm: cut off after 45 s" in page
    assert "matmul bf16 500.00 TFLOP/s" in page


def test_the_cases_of_every_kernel_and_nothing_else_are_run() -> None:
    csrc = ROOT / "csrc"
    assert gpu.case_names("tests/ops/cuda_cases") == sorted({path.parent.name for path in csrc.glob("*/cuda*.cu")})
    assert gpu.case_names("tests/ops/triton_cases") == sorted(path.parent.name for path in csrc.glob("*/triton.py"))
    assert gpu.case_names("benchmarks/kernel_cases") == case_modules()
