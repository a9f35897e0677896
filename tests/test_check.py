"""`megatron-lite check`: what it says of a config and its schedule, and its exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from megatron_lite.cli import app
from megatron_lite.pipeline import schedules
from megatron_lite.pipeline.instructions import Schedule

ROOT = Path(__file__).parents[1]
QUICKSTART, LARGE = ROOT / "configs/runs/quickstart.yaml", ROOT / "configs/runs/llama3-8b-64xa100.yaml"
SEMANTICS = (
    "buffered sends",
    "one ordered stream for each direction",
    "one ordered stream for each rank",
    "rendezvous",
)


def check(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["check", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.mark.parametrize("config", sorted((ROOT / "configs/runs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_that_is_shipped(config: Path) -> None:
    result = check(config)
    assert result.exit_code == 0, result.output
    assert all(one in result.output for one in SEMANTICS)


def test_what_it_says() -> None:
    result = check(QUICKSTART, "--world", 64, "parallel.pp=4", "train.global_batch_size=256")
    assert result.exit_code == 0, result.output
    shown = [line.rstrip() for line in result.output.splitlines()]
    assert " ranks                 64: pp 4 x dp 8 x tp 2" in shown
    assert " schedule              1f1b, 16 microbatches, 328 instructions" in shown
    assert " peak activations      4, 3, 2, 1 chunk inputs, of pp rank 0 and on" in shown
    assert any("dp 2 x tp 2, which stand for any number of replicas" in line for line in shown)


def test_a_batch_that_grows_is_proven_at_every_size() -> None:
    ramp = "train.batch_rampup=[32,32,1000]"
    result = check(QUICKSTART, "--world", 64, "parallel.pp=4", "train.global_batch_size=256", ramp)
    assert result.exit_code == 0, result.output
    assert (
        "1f1b, 16 microbatches, 328 instructions; and those of the 7 smaller batches of train.batch_rampup"
        in " ".join(result.output.split())
    )


def test_the_smallest_world() -> None:
    assert "4: pp 2 x dp 1 x tp 2" in check(QUICKSTART).output
    assert "8: pp 2 x dp 2 x tp 2" in check(QUICKSTART, "parallel.dp=2").output
    alone = check(QUICKSTART, "parallel.pp=1", "parallel.tp=1").output
    assert "1: pp 1 x dp 1 x tp 1" in alone and "there are none" in alone


def test_a_world_of_a_size_that_no_machine_has() -> None:
    result = check(LARGE, "--world", 8192, "train.global_batch_size=8192")
    assert result.exit_code == 0 and "8,192: pp" in result.output, result.output


def test_a_layout_that_does_not_fill_the_world_is_the_users_to_mend() -> None:
    result = check(QUICKSTART, "--world", 7)
    assert result.exit_code == 2
    assert "must divide the number of processes, 7" in result.stderr and "parallel.tp=1 parallel.pp=1" in result.stderr


@pytest.mark.parametrize(
    ("change", "diagnosis"),
    [
        (lambda one: one[:-1], 'rank 1: "reduce gradients" is missing'),
        (
            lambda one: (one[2], *one[:2], *one[3:]),
            'message 0 from rank 0 to rank 1 is "send activation of chunk 0, microbatch 0" at one end and "receive '
            'activation of chunk 1, microbatch 1" at the other',
        ),
    ],
    ids=["missing", "order"],
)
def test_a_schedule_that_is_not_right(change: object, diagnosis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = schedules.make_schedule("1f1b", 2, 1, 4)
    broken = Schedule("1f1b", right.placement, 4, (right.lists[0], change(right.lists[1])))  # type: ignore[operator]
    monkeypatch.setattr(schedules, "make_schedule", lambda *sizes: broken)
    result = check(QUICKSTART)
    assert result.exit_code == 1
    assert result.stderr == f"the schedule 1f1b is not right: {diagnosis}\n"


def test_it_needs_no_torch() -> None:
    """The proof is plain Python: it runs where a job is submitted from, which may have no GPU and no torch."""
    code = (
        "import sys; from megatron_lite.pipeline.prove import prove; "
        "from megatron_lite.pipeline.schedules import make_schedule; prove(make_schedule('1f1b', 2, 1, 4), dp=2); "
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
