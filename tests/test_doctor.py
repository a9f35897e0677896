"""`megatron-lite doctor`: what it says of this machine, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from megatron_lite.cli import app
from megatron_lite.config.kernels import KernelsConfig
from megatron_lite.ops import attention, dispatch, native

ROOT = Path(__file__).parents[1]
ATTENTION = ("attention", "kernels.attention")
needs_native = pytest.mark.skipif(native.missing_cpu() is not None, reason=str(native.missing_cpu()))
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so its backends do run")


def doctor(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)], env={"COLUMNS": "250"})


def kernels_of(result: Result) -> list[dict[str, str]]:
    return json.loads(result.stdout)["kernels"]["rows"]


@needs_native
@needs_no_gpu
def test_the_environment_and_every_op() -> None:
    result = doctor()
    assert result.exit_code == 0
    for word in ("Python", torch.__version__, native.instruction_set(), "none that torch sees", *dispatch.BACKENDS):
        assert word in result.output
    assert "cuda" not in {row["device"] for row in kernels_of(doctor("--json"))}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_table_is_what_auto_runs(device: str) -> None:
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
    seen = set()
    for row in kernels_of(doctor("--device", device, "--json")):
        for name in row["dtypes"].split(", "):
            assert dispatch.select(row["op"], "auto", names[name], device).backend == row["runs"]
            seen.add((row["op"], name))
    assert seen == {(op, name) for op in dispatch.BACKENDS for name in names}


@needs_no_gpu
def test_why_not_the_others() -> None:
    rows = [row for row in kernels_of(doctor("--device", "cuda", "--verbose", "--json")) if row["op"] == "rms_norm"]
    assert rows[0]["runs"] == "reference" and "torch sees no CUDA device" in rows[0]["why"]
    assert (
        "triton: torch sees no CUDA device" in rows[0]["cannot run"] and "cpu: it runs on cpu" in rows[0]["cannot run"]
    )
    assert "cannot run" not in kernels_of(doctor("--json"))[0]


@needs_native
def test_a_few_queries_go_elsewhere_and_it_says_so() -> None:
    report = json.loads(doctor("--config", ROOT / "configs/runs/quickstart.yaml", "run.device=cpu", "--json").stdout)
    rows = [*kernels_of(doctor("--device", "cpu", "--json")), *report["config"]["rows"]]
    attention_rows = [row for row in rows if row["runs"] == "cpu" and row.get("op", row.get("key")) in ATTENTION]
    assert len(attention_rows) == 2
    for row in attention_rows:
        assert row["why"].endswith(f"; fewer than {dispatch.FEW_QUERIES} queries: sdpa")
    assert not any("queries" in row["why"] for row in rows if row not in attention_rows)
    name = attention(*(torch.ones(1, dispatch.FEW_QUERIES - 1, 1, 8, requires_grad=True) for _ in range(3))).grad_fn
    assert "attention_cpu" not in str(name)
    assert "attention_cpu" in str(attention(*(torch.ones(1, 8, 1, 8, requires_grad=True) for _ in range(3))).grad_fn)


@needs_no_gpu
def test_a_config_says_what_it_will_run() -> None:
    config = ROOT / "configs/runs/quickstart.yaml"
    report = json.loads(doctor("--config", config, "--json").stdout)["config"]
    assert {row["key"] for row in report["rows"]} == {f"kernels.{op}" for op in KernelsConfig.model_fields}
    assert all(row["runs"] != "nothing" for row in report["rows"]) and report["problems"] == []

    result = doctor("--config", config, "kernels.rms_norm=triton")
    assert result.exit_code == 2
    assert "to mend: kernels.rms_norm=triton cannot run" in result.output
    assert doctor("kernels.rms_norm=triton").exit_code == 2  # of no config


def test_a_config_that_is_not_there_is_the_users_to_mend() -> None:
    result = doctor("--config", "nowhere.yaml")
    assert result.exit_code == 2 and "nowhere.yaml" in result.output


def test_a_library_that_does_not_load_is_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(native, "LIBRARY", broken)
    for cached in (native.missing_cpu, native.missing_cuda, dispatch._select):
        cached.cache_clear()
    try:
        result = doctor()
    finally:
        monkeypatch.undo()
        for cached in (native.missing_cpu, native.missing_cuda, dispatch._select):
            cached.cache_clear()
    assert result.exit_code == 2
    assert "to mend: CPU kernels: the native library does not load" in result.output
