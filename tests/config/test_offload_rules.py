"""What can be offloaded, and where to: what loads, what is refused, and that the advice mends it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lite.config import ConfigError, Problem, load_config

KEYS = (
    "model.family=llama",
    "model.vocab_size=97",
    "model.hidden_size=64",
    "model.num_layers=2",
    "model.num_heads=4",
    "model.max_seq_len=32",
    "train.seq_len=32",
    "train.global_batch_size=8",
    "train.num_steps=50",
)


def problems(text: str, *, files_exist: bool = False) -> list[Problem]:
    try:
        load_config(None, [*KEYS, *text.split()], files_exist=files_exist)
    except ConfigError as error:
        return [problem for problem in error.problems if not problem.key.startswith("data.")]
    return []


@pytest.mark.parametrize(
    "text",
    [
        "",
        *(f"offload.optimizer=cpu parallel.zero_stage={stage}" for stage in range(4)),
        "offload.optimizer=nvme offload.dir=/scratch parallel.zero_stage=0",
        "offload.gradients=cpu parallel.zero_stage=2",
        "offload.gradients=nvme offload.dir=/scratch parallel.zero_stage=3",
        "offload.parameters=cpu parallel.zero_stage=3",
        "offload.optimizer=nvme offload.gradients=nvme offload.parameters=nvme offload.dir=d parallel.zero_stage=3",
    ],
)
def test_legal(text: str) -> None:
    assert problems(text) == []


# (overrides, the key, the fixes offered)
BROKEN = [
    ("offload.gradients=cpu", "offload.gradients", ["parallel.zero_stage=2", "offload.gradients=none"]),
    (
        "offload.gradients=nvme offload.dir=d parallel.zero_stage=0",
        "offload.gradients",
        ["parallel.zero_stage=2", "offload.gradients=none"],
    ),
    (
        "offload.parameters=cpu parallel.zero_stage=2",
        "offload.parameters",
        ["parallel.zero_stage=3", "offload.parameters=none"],
    ),
    ("offload.optimizer=nvme", "offload.dir", ["offload.optimizer=cpu"]),
    (
        "offload.optimizer=nvme offload.gradients=nvme parallel.zero_stage=2",
        "offload.dir",
        ["offload.optimizer=cpu offload.gradients=cpu"],
    ),
    ("offload.dir=d", "offload.dir", ["offload.optimizer=nvme", "offload.dir=null"]),
    ("offload.optimizer=cpu offload.dir=d", "offload.dir", ["offload.optimizer=nvme", "offload.dir=null"]),
    ("offload.optimizer=disk", "offload.optimizer", ["offload.optimizer=none"]),
]


@pytest.mark.parametrize(("text", "key", "offered"), BROKEN)
def test_refused_with_advice_that_mends_it(text: str, key: str, offered: list[str]) -> None:
    (problem,) = problems(text)
    assert problem.key == key and problem.rule
    advice = [" ".join(fix) for fix in problem.fixes]
    assert set(offered) <= set(advice)
    for fix in advice:
        # Without gradients in files the folder may have nothing to hold, which is another rule's affair.
        assert key not in {left.key for left in problems(f"{text} {fix}")}, fix


def test_a_folder_of_ones_own_mends_a_missing_one() -> None:
    (problem,) = problems("offload.optimizer=nvme")
    assert "give a folder" in problem.advice
    assert problems("offload.optimizer=nvme offload.dir=d") == []


def test_both_slices_are_refused_at_once() -> None:
    found = problems("offload.gradients=cpu offload.parameters=cpu parallel.zero_stage=1")
    assert [problem.key for problem in found] == ["offload.gradients", "offload.parameters"]


def test_the_folder_is_looked_for_when_asked(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    keys = "offload.optimizer=nvme offload.dir="
    assert problems(f"{keys}{tmp_path}", files_exist=True) == []
    for path, words in ((tmp_path / "no", "does not exist"), (file, "is not a folder")):
        (problem,) = problems(f"{keys}{path}", files_exist=True)
        assert problem.key == "offload.dir" and words in problem.rule
        assert problems(f"{keys}{path}") == [], "a launcher on another machine may still read the config"
