"""The ZeRO benchmark runs ours beside its peers, they compute one thing, and what they move is counted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks import results, rows
from benchmarks.results import Record
from benchmarks.rows import ROWS, require, select
from benchmarks.team import Measurement
from benchmarks.traffic import Traffic, TrafficCounter
from benchmarks.workloads import WORKLOADS

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "zero.py"
SMOKE = WORKLOADS["smoke"]


def _run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--smoke", "--rounds", "1", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_sizes_are_the_published_ones() -> None:
    assert round(WORKLOADS["25M"].num_parameters / 1e6, 1) == 25.0
    assert round(WORKLOADS["110M"].num_parameters / 1e6, 1) == 110.1


def test_a_whole_name_selects_one_row_and_a_beginning_all() -> None:
    assert [row.name for row in select("zero-fp32-dp2-stage1")] == ["zero-fp32-dp2-stage1"]
    assert [row.name for row in select("zero-fp32-dp2-stage3-")] == [
        "zero-fp32-dp2-stage3-keep",
        "zero-fp32-dp2-stage3-m4",
    ]


def test_the_volume_of_theory() -> None:
    """Stages 1 and 2: 2P. Stage 3: 3P, or 2P when it keeps; 2P + P for each microbatch when it gathers again.

    Less what two uses in a row need no second gather for: the head, and between microbatches the embedding.
    """
    shape = WORKLOADS["25M"]
    table = shape.vocab_size * shape.hidden_size
    head = table + shape.hidden_size
    names = ("stage1", "stage2", "stage3", "stage3-keep", "stage1-m4", "stage2-m4", "stage3-m4")
    of_p = (2, 2, 3, 2, 2, 5, 12)
    saved = (0, 0, head, 0, 0, 0, 4 * head + 3 * table)
    for name, multiple, elements in zip(names, of_p, saved, strict=True):
        volume = results.zero_volume(ROWS[f"zero-fp32-dp2-{name}"], shape)
        padding = 8 * 512 * multiple  # at most, of 8 units, each time they move
        assert 0 <= volume - (multiple * shape.num_parameters - elements) <= padding, name


def test_a_volume_off_theory_is_found() -> None:
    row = ROWS["zero-fp32-dp2-stage2"]
    expected = results.zero_volume(row, SMOKE)
    step = Measurement(1.0, 2.0, 0.0, 5.5, 1.5, [2**20], Traffic(expected // 2, expected // 2, 4 * expected))
    ours = Record(row.name, "ours", SMOKE.num_parameters, [2**20], [step], [step])
    assert results.off_theory(row, SMOKE, [ours]) == []
    for wrong in (Traffic(expected, expected // 2, 6 * expected), Traffic(0, expected - 1, 4 * expected)):
        off = replace(ours, rounds=[replace(step, traffic=wrong)])
        assert f"moved {wrong.elements} elements" in results.off_theory(row, SMOKE, [off])[0]
        assert (
            results.off_theory(row, SMOKE, [replace(off, contender="peers.x")]) == []
        )  # peers may move what they like


def _count_collectives(path: Path) -> Traffic:
    dist.init_process_group("gloo", store=dist.FileStore(str(path), 1), rank=0, world_size=1)
    try:
        counter = TrafficCounter()
        counter.install()
        whole, part = torch.zeros(10), torch.zeros(10)
        dist.all_reduce(whole)
        dist.all_gather([whole], part)
        dist.all_to_all_single(whole, part.bfloat16().float())
        dist.broadcast(tensor=whole.bfloat16(), src=0)
        return counter.take()
    finally:
        dist.destroy_process_group()


def test_collectives_are_counted_by_their_whole_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("all_reduce", "all_gather", "all_to_all_single", "broadcast"):
        monkeypatch.setattr(dist, name, getattr(dist, name))  # so that the counter is taken off afterwards
    assert _count_collectives(tmp_path / "store") == Traffic(30, 20, 2 * 40 + 40 + 40 + 20)


def test_a_missing_deepspeed_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "find_spec", lambda name: None if name == "deepspeed" else find_spec(name))
    require(["peers.fsdp2"])
    with pytest.raises(ValueError, match=re.escape("pip install 'megatron-lite[benchmark]'; --without deepspeed")):
        require(["peers.deepspeed"])


def test_an_unknown_stage_ends_in_one_sentence() -> None:
    done = _run("--stages", "4")
    assert done.returncode != 0
    assert "there is no row zero-fp32-dp2-stage4" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "num_rows", "loss_tolerance", "norm_tolerance"),
    [
        ("--dtype fp32 --variants m4", 6, 1e-5, 1e-4),  # only the order of sums differs
        # Each contender rounds at other places (2**-8 a rounding), and those of the variant param their sums too.
        ("--dtype bf16 --stages 3 --variants keep,param", 3, 1e-3, 3e-2),
    ],
)
def test_all_stages_agree_with_the_peers(
    options: str, num_rows: int, loss_tolerance: float, norm_tolerance: float, tmp_path: Path
) -> None:
    """And ours moves what theory says: else the benchmark ends with an error."""
    out = tmp_path / "zero.json"
    without = [] if find_spec("deepspeed") else ["--without", "deepspeed"]
    done = _run(*options.split(), "--processes", "2", "--out", str(out), *without)
    assert done.returncode == 0, done.stderr
    records = json.loads(out.read_text())["records"]
    assert len(records) == num_rows * (2 if without else 3)
    for number in ("warmup", "rounds"):
        for quantity, tolerance in (("loss", loss_tolerance), ("grad_norm", norm_tolerance)):
            values = [record[number][0][quantity] for record in records]
            assert max(values) - min(values) <= tolerance * values[0], (number, quantity, values)
    assert records[0]["rounds"][0]["loss"] < records[0]["warmup"][0]["loss"] - 0.005  # the update is seen
