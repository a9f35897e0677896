"""--deepspeed as a person uses it: the lines, the exit codes, and a run that is the same as one of our own keys."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from megatron_lite.cli import app
from megatron_lite.cli.deepspeed import print_lines
from megatron_lite.config.deepspeed import read_deepspeed
from tests.train.commands import PROGRAM, TORCHRUN, write_config
from tests.train.tiny_run import make_corpus, read_metrics, same_numbers

CONFIGS = Path(__file__).parents[1] / "configs"
SAMPLE, RUN = CONFIGS / "deepspeed" / "zero2-bf16.json", CONFIGS / "runs" / "quickstart.yaml"

DOCUMENT: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 4,
    "zero_optimization": {"stage": 1, "overlap_comm": True},
    "optimizer": {"type": "Adam", "params": {"lr": 5e-3, "betas": [0.9, 0.98]}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_num_steps": 3, "warmup_max_lr": 4e-3, "total_num_steps": 9},
    },
    "gradient_clipping": 0.5,
}
SAME = [
    "train.micro_batch_size=1",
    "train.global_batch_size=8",
    "parallel.zero_stage=1",
    "optim.lr=4e-3",
    "optim.beta1=0.9",
    "optim.beta2=0.98",
    "optim.weight_decay=0.0",
    "optim.schedule=linear",
    "optim.min_lr=0.0",
    "optim.warmup_steps=3",
    "optim.decay_steps=9",
    "optim.clip_grad_norm=0.5",
]


def invoke(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def write(folder: Path, document: object) -> Path:
    path = folder / "ds_config.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return path


def test_check_says_each_key_in_one_line_of_stderr() -> None:
    done = invoke("check", RUN, "--world", 8, "--deepspeed", SAMPLE)
    assert done.exit_code == 0, done.stderr
    lines = done.stderr.splitlines()
    assert all(line.startswith("deepspeed ") for line in lines) and "deepspeed" not in done.stdout
    assert len(lines) == len(read_deepspeed(SAMPLE, RUN, world_size=8).lines)
    assert "4 microbatches" in done.stdout  # 16 / (2 * dp 2)
    (stage,) = (line for line in lines if "zero_optimization.stage" in line)
    assert stage.startswith("deepspeed taken   zero_optimization.stage = 2 -> parallel.zero_stage=2: replaces ")


def test_the_command_line_wins() -> None:
    done = invoke("check", RUN, "--world", 8, "--deepspeed", SAMPLE, "train.global_batch_size=32")
    assert done.exit_code == 0 and "8 microbatches" in done.stdout


def test_a_terminal_gets_a_table() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None)
    reading = read_deepspeed(SAMPLE, RUN, world_size=8)
    print_lines(reading.lines, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "what differs" in shown and "deepspeed taken" not in shown
    assert all(line.key in shown for line in reading.lines)


BAD: list[tuple[object, str]] = [
    ('{"a": 1,\n}', "ds_config.json:"),
    ([1], "must be an object"),
    (
        {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 5},
        "= 4 * 5 * 2 = 40",
    ),
    ({"optimizer": {"type": "Lamb"}}, "optim.name=adamw"),
]


@pytest.mark.parametrize(("document", "says"), BAD)
@pytest.mark.parametrize("command", [("check", "--world", "8"), ("train", "--nproc", "8"), ("verify",)])
def test_bad_files_end_with_one_error_and_code_2(
    command: tuple[str, ...], document: object, says: str, tmp_path: Path
) -> None:
    done = invoke(*command, RUN, "parallel.dp=2", "--deepspeed", write(tmp_path, document))
    assert done.exit_code == 2
    lines, _, error = done.stderr.partition("error: ")
    assert error.startswith("1 problem in ") and says in error and "error: " not in error
    assert all(line.startswith("deepspeed ") for line in lines.splitlines())
    assert "Traceback" not in done.stderr


def test_a_refusal_comes_after_the_lines(tmp_path: Path) -> None:
    document = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "Lamb"}, "steps_per_print": 10}
    done = invoke("check", RUN, "--world", 8, "--deepspeed", write(tmp_path, document))
    lines, _, error = done.stderr.partition("error: ")
    assert error.startswith(f"1 problem in {tmp_path}") and done.exit_code == 2
    statuses = {line.split()[2]: line.split()[1] for line in lines.splitlines()}
    assert statuses["zero_optimization.stage"] == "taken" and statuses["steps_per_print"] == "ignored"
    assert statuses["optimizer.type"] == "refused"


def test_an_error_of_what_the_file_has_set_names_both_files(tmp_path: Path) -> None:
    file = write(tmp_path, {"gradient_clipping": -1.0})
    done = invoke("check", RUN, "--world", 8, "--deepspeed", file)
    assert done.exit_code == 2 and f"error: 1 problem in {RUN} with {file}:" in done.stderr
    done = invoke("check", RUN, "--world", 8, "optim.clip_grad_norm=-1")
    assert f"error: 1 problem in {RUN}:" in done.stderr, "negative control"


def test_plan_takes_it_too() -> None:
    plans = {stage: invoke("plan", RUN, "--memory", "--json", "--world", 8, "--deepspeed", SAMPLE, *stage) for stage in
             ((), ("parallel.zero_stage=0",))}  # fmt: skip
    asked = ("train.precision=bf16", "train.global_batch_size=16", "train.micro_batch_size=2", "parallel.zero_stage=2")
    ours = invoke("plan", RUN, "--memory", "--json", "--world", 8, *asked)
    states = [[stage["gradients"] for stage in json.loads(done.stdout)["stages"]] for done in (ours, *plans.values())]
    assert states[0] == states[1] != states[2]
    assert all("deepspeed " in done.stderr for done in plans.values())


@pytest.mark.parametrize("limit", ["0", "0GiB", "0.1B"])
def test_a_limit_of_nothing_is_refused(limit: str) -> None:
    done = invoke("plan", RUN, "--memory", "--world", 8, "--limit", limit)
    assert done.exit_code == 2 and done.stderr == "error: --limit must be more than 0 bytes\n"
    assert invoke("plan", RUN, "--memory", "--world", 8, "--limit", "1B").exit_code == 1, "negative control"


def test_a_missing_file(tmp_path: Path) -> None:
    done = invoke("check", RUN, "--deepspeed", tmp_path / "none.json")
    assert done.exit_code == 2 and "there is no such file" in done.stderr


def test_a_run_by_deepspeeds_keys_is_that_of_our_keys(tmp_path: Path) -> None:
    """Every number of every step in every bit; and another learning rate gives others (negative control)."""
    corpus = make_corpus(tmp_path)
    config = write_config(tmp_path, corpus)
    document = write(tmp_path, DOCUMENT)
    by_torchrun = [*TORCHRUN, "--nproc-per-node", "2", "-m", "megatron_lite"]
    runs = {
        "theirs": (PROGRAM, "--nproc", 2, "--deepspeed", document),
        "torchrun": (by_torchrun, "--deepspeed", document),
        "ours": (PROGRAM, "--nproc", 2, *SAME),
        "other": (PROGRAM, "--nproc", 2, "--deepspeed", document, "optim.lr=3e-3"),
    }
    for name, (program, *arguments) in runs.items():
        words = [*program, "train", str(config), *map(str, arguments), f"run.name={name}"]  # type: ignore[misc]
        done = subprocess.run(words, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr
        told = [line for line in done.stderr.splitlines() if line.startswith("deepspeed ")]
        assert len(told) == len({line.split()[2] for line in told}), "the ranks do not repeat what the first one says"
        assert bool(told) == (name != "ours")
    folder = tmp_path / "runs"
    assert len(read_metrics(folder / "ours")) == 12
    assert same_numbers(folder / "theirs", folder / "ours") == []
    assert same_numbers(folder / "torchrun", folder / "ours") == []
    assert same_numbers(folder / "other", folder / "ours") != []
