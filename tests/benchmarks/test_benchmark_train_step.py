"""The step benchmark runs, its contenders compute one thing, and it notices when they do not."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import results
from benchmarks.results import Record
from benchmarks.rows import ROWS, require, select
from benchmarks.team import ContenderFailed, Measurement, Team
from benchmarks.traffic import Traffic
from benchmarks.workloads import WORKLOADS, batch, write_weights

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "train_step.py"
SMOKE = WORKLOADS["smoke"]
INITIAL_LOSS = 5.545  # ln 256


def _record(contender: str, walls: list[float], loss: float = INITIAL_LOSS, parameters: int | None = None) -> Record:
    steps = [Measurement(wall, 2 * wall, 0.0, loss, 1.5, [2**20], Traffic()) for wall in walls]
    count = SMOKE.num_parameters if parameters is None else parameters
    return Record("single-fp32", contender, count, [2**20], steps[:1], steps[1:])


def test_workloads_are_the_published_ones() -> None:
    assert round(WORKLOADS["W1"].num_parameters / 1e6, 1) == 32.0
    assert round(WORKLOADS["W2"].num_parameters / 1e6, 1) == 124.7
    assert round(WORKLOADS["W1"].flops_per_token / 1e6) == 179
    assert WORKLOADS["W1"].tokens_per_step == WORKLOADS["W2"].tokens_per_step == 4096
    for workload in WORKLOADS.values():
        assert all(sum(layers) == workload.num_layers for layers in workload.chunk_layers.values())


def test_a_batch_depends_on_its_step_alone() -> None:
    first = batch(SMOKE, 3)
    assert first.shape == (SMOKE.batch_size, SMOKE.seq_len + 1) and first.dtype == torch.int64
    assert int(first.min()) >= 0
    assert int(first.max()) < SMOKE.vocab_size
    assert torch.equal(first, batch(SMOKE, 3))
    assert not torch.equal(first, batch(SMOKE, 4))


@pytest.mark.parametrize("name", list(ROWS))
def test_every_row_divides_every_workload(name: str) -> None:
    row = ROWS[name]
    for workload in WORKLOADS.values():
        job = row.job(row.contenders[0], workload, "unused", cores=2)
        assert job.num_microbatches == row.num_microbatches
        assert job.num_microbatches * job.micro_batch_size * job.dp == workload.batch_size
        assert job.threads * job.world_size == max(2, job.world_size)


def test_rows_are_chosen_by_their_beginnings() -> None:
    assert [row.name for row in select("tp2,single-bf16")] == ["single-bf16", "tp2-fp32", "tp2-bf16"]
    assert len(select("all")) == len(ROWS) > len(select(""))
    with pytest.raises(ValueError, match="no row begins with 'tp4'; there are: single-fp32"):
        select("single,tp4")


def test_a_missing_contender_is_named_before_anything_runs() -> None:
    require(["peers.transformers_llama"])
    with pytest.raises(ValueError, match=r"benchmarks/peers/nobody\.py does not exist"):
        require(["peers.nobody"])


def test_ratios_pair_the_rounds() -> None:
    ours, peer = _record("ours", [9.0, 1.0, 2.0, 9.0]), _record("peers.x", [9.0, 2.0, 4.0, 6.0])
    assert results.time_ratios(ours, peer) == (2.0 / 4.0, 0.5)  # medians 2 and 4; ratios 0.5, 0.5, 1.5
    line = results.table([ours, peer], SMOKE)[1]
    assert line[-2:] == ("0.500", "0.500")
    assert results.markdown([line]).count("\n") == 2


def test_contenders_that_differ_are_found() -> None:
    row, peer = ROWS["single-fp32"], _record("peers.x", [1.0, 1.0])
    assert results.disagreements(row, SMOKE, [_record("ours", [1.0, 1.0]), peer]) == []
    for broken, word in (
        (_record("ours", [1.0, 1.0], loss=INITIAL_LOSS * 1.001), "loss"),
        (_record("ours", [1.0, 1.0], loss=float("nan")), "loss nan"),
        (_record("ours", [1.0, 1.0], parameters=7), "7 parameters"),
    ):
        found = results.disagreements(row, SMOKE, [broken, peer])
        assert found and any(word in line for line in found)
    louder = replace(peer, contender="ours", rounds=[replace(peer.rounds[0], grad_norm=1.51)])
    assert "gradient norm" in results.disagreements(row, SMOKE, [louder, peer])[0]


def test_a_contender_that_spins_is_reported() -> None:
    quiet = _record("peers.x", [1.0, 1.0])
    assert results.spinning(quiet) is None
    spins = replace(quiet, rounds=[replace(quiet.rounds[0], idle_cpu_s=0.5)])
    assert "burned 0.500 CPU-s" in (results.spinning(spins) or "")


def test_a_contender_that_dies_is_quoted(tmp_path: Path) -> None:
    job = ROWS["plain-fp32"].job("peers.plain_torch", SMOKE, str(tmp_path / "nowhere"), cores=2)
    with pytest.raises(ContenderFailed, match="rank 0 ended with code 1 while building") as failure:
        Team(job, timeout_s=120.0)
    assert "nowhere" in str(failure.value)


def test_a_contender_that_hangs_is_stopped(tmp_path: Path) -> None:
    write_weights(SMOKE, tmp_path)
    job = ROWS["tp2-fp32"].job("peers.dtensor_tp", SMOKE, str(tmp_path), cores=2)
    with pytest.raises(ContenderFailed, match=r"ranks \[0, 1\] did not answer within 0.01 s while building"):
        Team(job, timeout_s=0.01)


@pytest.mark.slow
def test_contenders_of_every_layout_agree(tmp_path: Path) -> None:
    """Ours and the peers, in one process, tensor parallel and pipelined: same losses and gradient norms."""
    out = tmp_path / "out.json"
    rows = "single-fp32,tp2-fp32,pp2-m4-fp32"
    command = [sys.executable, str(SCRIPT), "--smoke", "--cores", "1", "--rows", rows]
    options = ["--rounds", "1", "--warmup", "1", "--out", str(out)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "| single-fp32 | transformers_llama |" in done.stdout
    records = json.loads(out.read_text())["records"]
    assert len(records) == 6
    for record in records:
        assert record["num_parameters"] == SMOKE.num_parameters
        assert min(step["wall_s"] for step in record["rounds"]) > 0.0
    for number in ("warmup", "rounds"):
        for quantity, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):  # fp32: only the order of sums differs
            values = [record[number][0][quantity] for record in records]
            assert max(values) - min(values) <= tolerance * values[0], (number, quantity, values)
    # The update is seen: losses after it are not those before it (by 0.008, where contenders differ by 1e-5).
    assert records[0]["rounds"][0]["loss"] < records[0]["warmup"][0]["loss"] - 0.005


def test_an_unknown_row_ends_in_one_sentence() -> None:
    command = [sys.executable, str(SCRIPT), "--smoke", "--rows", "tp3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "no row begins with 'tp3'" in done.stderr and "Traceback" not in done.stderr


def test_the_pipeline_benchmark_runs_its_schedules(tmp_path: Path) -> None:
    out = tmp_path / "pipeline.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "pipeline.py"), "--smoke", "--rounds", "1", "--out", str(out)]
    subprocess.run([*command, "--schedules", "1f1b,interleaved,zb-v"], check=True, capture_output=True, timeout=300)
    records = json.loads(out.read_text())["records"]
    assert [record["row"] for record in records[::2]] == [
        "pipeline-fp32-1f1b",
        "pipeline-fp32-interleaved",
        "pipeline-fp32-zb-v",
    ]
    assert {record["contender"] for record in records} == {"ours", "peers.torch_pipelining"}
