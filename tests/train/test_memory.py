"""The memory of a run: what it says as it starts, what it leaves, and where it does not start."""

from __future__ import annotations

import io
import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_lite.config import RunConfig, load_config
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.planner.amounts import Amount
from megatron_lite.planner.memory import CATEGORIES, STATE, MemoryPrediction
from megatron_lite.train import memory
from megatron_lite.train.memory import MemoryAccount
from megatron_lite.train.start import zero_in_words
from megatron_lite.utils import run_files
from tests.ops.oracle import ROOT
from tests.report.run_folder import KEYS
from tests.train.commands import write_config
from tests.train.poison import job
from tests.train.tiny_run import BATCH, SEQ_LEN, tiny_config

# Of a model whose state alone is over 400 GiB, where torch itself takes some ten of addresses. A run that was not
# refused would fail here when it asks for memory, and in another way.
LARGE = ("model.hidden_size=16384", "model.num_layers=8", "model.num_heads=64", "model.num_kv_heads=64")
LIMIT = 100 << 30


def _train(config: Path, *arguments: str, limit: int = LIMIT) -> subprocess.CompletedProcess[str]:
    """A run whose processes have a limit on their addresses."""
    return subprocess.run(
        [sys.executable, "-m", "megatron_lite", "train", str(config), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )


def test_a_run_says_what_it_takes(corpus: Path, tmp_path: Path) -> None:
    config = write_config(
        tmp_path, corpus, "tiny", "train.num_steps=1", "optim.warmup_steps=0", "train.eval_interval=0"
    )
    done = _train(config, "parallel.pp=2", "--nproc", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(name in done.stdout for name in ("predicted", "measured", "master weights", "activations"))
    assert "memory of stage 0, the largest" in done.stdout or "memory of stage 1, the largest" in done.stdout
    assert re.search(r"^(\[0\])? *state +(\S+ \S+) +\2 *$", done.stdout, re.MULTILINE), done.stdout
    assert "ZeRO" not in done.stdout, "there is one data-parallel rank"
    account = json.loads((tmp_path / "runs/tiny" / run_files.UTILISATION).read_text())["memory"]
    for predicted, measured in zip(account["predicted"], account["measured"], strict=True):
        assert {name: predicted[name] for name in STATE} == {name: measured[name] for name in STATE}
        # The embedding keeps the token ids of the whole step, which the prediction has among the buffers.
        ids = BATCH * SEQ_LEN * 8 if predicted["stage"] == 0 else 0
        assert measured["activations"]["device"] == predicted["activations"]["device"] + ids
        assert measured["moments"]["device"] == 2 * measured["parameters"]["device"] > 0
        assert all(name in predicted for name in CATEGORIES)
    assert len(account["measured"]) == 2


def test_all_places_have_totals() -> None:
    """Where state lies in main memory or in files, too; what is measured is summed."""
    parts = {name: Amount(device=i << 20, host=i << 22, disk=i << 24) for i, name in enumerate(STATE, start=1)}
    rest = {"activations": Amount(device=1 << 20), "buffers": Amount(), "buffer_parts": {}}
    measured = {name: Amount(device=(i + 1) << 20, host=i << 22, disk=i << 24) for i, name in enumerate(STATE, 1)}
    out = io.StringIO()
    Console(file=out, width=100).print(MemoryAccount([MemoryPrediction(0, **parts, **rest)], [measured]).table())
    rows = [re.split(r"  +", line.strip()) for line in out.getvalue().splitlines()]
    assert rows[-6:] == [
        ["state", "10.0 MiB", "14.0 MiB"],
        ["state in main memory", "40.0 MiB", "40.0 MiB"],
        ["state in files", "160 MiB", "160 MiB"],
        ["total", "11.0 MiB"],
        ["total in main memory", "40.0 MiB"],
        ["total in files", "160 MiB"],
    ], rows


@pytest.mark.parametrize(
    ("asked", "settled", "limit", "says"),
    [
        ("auto", "regather", None, "parameters gathered for each use: no memory limit is known"),
        ("auto", "regather", 1, "parameters gathered for each use: there is no room to keep them"),
        ("auto", "keep", 1, "parameters kept for the step: there is room for them"),
        ("keep", "keep", None, "parameters kept for the step"),
        ("regather", "regather", 1, "parameters gathered for each use"),
    ],
)
def test_the_start_says_what_auto_chose(
    monkeypatch: pytest.MonkeyPatch, asked: str, settled: str, limit: int | None, says: str
) -> None:
    monkeypatch.setattr(memory, "_limit_of", lambda mesh: limit)

    def config(policy: str, stage: int = 3) -> RunConfig:
        more = ("train.num_steps=1", f"parallel.zero_stage={stage}", f"parallel.gather_policy={policy}")
        return load_config(None, [*KEYS, "parallel.tp=1", "parallel.zero_group=2", *more], world_size=4)

    mesh: Any = None
    assert memory.gathering(config(asked), config(settled), mesh) == says
    assert zero_in_words(config(settled), says) == f"ZeRO 3 in groups of 2, {says}"
    assert memory.gathering(config("auto", 2), config("auto", 2), mesh) == ""


def test_the_start_line_names_what_is_not_usual(pool: WorkerPool, corpus: Path, tmp_path: Path) -> None:
    more = ("train.num_steps=1", "optim.warmup_steps=0", "train.eval_interval=0", "train.eval_batches=1")
    unusual = ("parallel.zero_stage=2", "offload.gradients=cpu", "optim.name=lion", "checkpoint.save_last=false")
    first, _ = pool.run(job, 2, tiny_config(corpus, tmp_path, "tiny", *more, *unusual, world_size=2), timeout_s=120)
    assert re.search(r"fp32, lion; .*; ZeRO 2; offloaded: gradients in main memory; 1 steps", first.said), first.said


def test_a_run_that_cannot_fit_does_not_start(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus, "large", *LARGE)
    done = _train(config, "--nproc", "2")
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert "rank 0 needs" in line and "the limit is 100 GiB (ulimit -v)" in line, line
    assert "parallel.zero_stage=" in line or "offload." in line, line
    assert not (tmp_path / "runs/large" / run_files.METRICS).exists()
