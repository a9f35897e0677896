"""The benchmark of the kernels runs, every op that has kernels has cases, and the numbers are those of the rounds."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import kernels
from benchmarks.kernel_cases.case import KernelCase, forward_backward
from benchmarks.kernel_table import rows_of
from benchmarks.kernel_timing import Timing, case_modules, cases_of, is_not_here, measure
from megatron_lite.ops import native
from megatron_lite.ops.adamw import AdamWStep, adamw
from tests.ops.oracle import ROOT

# Measured with the op that they are parts of.
PARTS = {"block_squares"}


def test_every_op_with_kernels_is_measured() -> None:
    ops = {path.parent.name for path in (ROOT / "csrc").glob("*/cuda*.cu")} - PARTS
    assert ops <= set(case_modules()), f"no benchmarks/kernel_cases/<op>.py for {ops - set(case_modules())}"


@pytest.mark.parametrize("op", case_modules())
def test_the_first_contender_is_ours(op: str) -> None:
    dtypes = set()
    for case in cases_of(op, "cpu"):
        assert next(iter(case.contenders)) == "ours" and len(case.contenders) > 1
        assert case.op in (op, f"add_{op}") and case.bytes_moved > 0 and case.label
        dtypes.add(case.dtype)
    assert {"fp32", "bf16"} <= dtypes


def test_contenders_take_turns_and_those_that_do_not_run_are_told() -> None:
    order: list[str] = []

    def sleeper(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    def absent() -> None:
        raise RuntimeError("No available kernel. Aborting execution.\nand more")

    contenders = {"ours": lambda: sleeper("a", 0.03), "b": lambda: sleeper("b", 0.06), "c": absent}
    timing = measure(KernelCase("op", "shape", "fp32", contenders, 100), "cpu", rounds=3)
    assert order == ["a", "a", "b", "b", *"ababab"]
    assert timing.not_here == {"c": "No available kernel. Aborting execution."} and timing.best_other == "b"
    assert timing.failed == {}
    assert timing.ratio("ours") == pytest.approx(2.0, rel=0.3)
    timing = measure(KernelCase("op", "shape", "fp32", {"ours": absent, "b": lambda: None}, 100), "cpu", rounds=1)
    assert timing.failed == {"ours": "No available kernel. Aborting execution."} and timing.not_here == {}


@pytest.mark.parametrize(
    ("error", "here"),
    [
        (ModuleNotFoundError("No module named 'apex'"), False),
        (NotImplementedError("Could not run 'aten::x' with arguments from the 'CUDA' backend"), False),
        (RuntimeError("\"x_cpu\" not implemented for 'Half'"), False),
        (RuntimeError("No available kernel. Aborting execution."), False),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (ValueError("q has 3 dimensions"), True),
        (TypeError("f() takes 1 positional argument but 2 were given"), True),
    ],
)
def test_a_peer_that_is_there_and_raises_has_failed(error: Exception, here: bool) -> None:
    def peer() -> None:
        raise error

    timing = measure(KernelCase("op", "shape", "fp32", {"ours": lambda: None, "b": peer}, 100), "cpu", rounds=1)
    assert (timing.failed, timing.not_here) == (({"b": str(error)}, {}) if here else ({}, {"b": str(error)}))
    (row,) = rows_of(timing, 1.0, lambda dtype: 1.0)
    assert row[3] == "ours" and row[5] == ("b failed" if here else "b not here")


@pytest.mark.skipif(native.missing_apex_adam() is None, reason="apex is installed")
def test_a_backend_that_is_not_installed_is_not_here() -> None:
    tensors = [torch.zeros(8, device="meta") for _ in range(4)]
    with pytest.raises(ValueError, match="apex") as raised:
        adamw(*tensors, AdamWStep(lr=1e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=1), backend="apex")
    assert is_not_here(raised.value)


def test_a_row_says_what_was_achieved() -> None:
    seconds = {"ours": [0.1, 0.2, 0.3], "ours, b": [9.0], "x": [0.5]}
    timing = Timing("op", "4 x 4", "bf16", 10**9, 0, seconds, {}, {"y": "-"})
    rows = rows_of(timing, 10e9, lambda dtype: 1e12)
    head, others = ("op", "4 x 4", "bf16"), "x 500, y not here"
    assert rows[0] == (*head, "ours", "200", others, "2.50", "5.0 GB/s", "copy 50%")
    assert rows[1] == (*head, "ours, b", "9000", others, "0.06", "0.1 GB/s", "copy 1%")
    timing = Timing("op", "4 x 4", "bf16", 1, 10**11, {"x": [0.5]}, {"ours": "why"}, {})
    assert rows_of(timing, 1.0, lambda dtype: 1e12) == [(*head, "ours", "failed", "x 500", "-", "-", "-")]
    timing = Timing("op", "4 x 4", "bf16", 1, 10**11, {"ours": [0.5]}, {}, {})
    assert rows_of(timing, 1.0, lambda dtype: 1e12)[0][-3:] == ("-", "200 GFLOP/s", "matmul 20%")


def test_gradients_are_part_of_a_run() -> None:
    x = torch.ones(3, requires_grad=True)
    (grad,) = forward_backward(lambda x, y: x * y, x, torch.full((3,), 2.0))()  # type: ignore[misc]
    assert grad.shape == (3,) and x.grad is None


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 8, requires_grad=True)
    runs = {name: forward_backward(torch.sigmoid, x) for name in ("ours", "torch")}
    monkeypatch.setattr(kernels, "cases_of", lambda op, *_: [KernelCase(op, "4 x 8", "fp32", runs, 5 * 4 * 8 * 4)])
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda device: 1e9)
    app = kernels.typer.Typer()
    app.command()(kernels.main)
    out = tmp_path / "kernels.json"
    result = CliRunner().invoke(app, ["--op", "rms_norm", "--rounds", "2", "--json", str(out)], env={"COLUMNS": "200"})
    assert result.exit_code == 0 and "4 x 8" in result.output
    report = json.loads(out.read_text())
    assert report["machine"]["copy_bytes_per_s"] == 1e9
    assert [len(seconds) for seconds in report["cases"][0]["seconds"].values()] == [2, 2]
    assert CliRunner().invoke(app, ["--op", "nothing"]).exit_code == 2
