"""The three batch sizes of a DeepSpeed config: inferred, overridden, contradictory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_lite.config import ConfigError
from tests.config.deepspeed_cases import (
    MODEL,
    Case,
    by_key,
)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


# (keys of the file, overrides, processes, global batch, micro batch); the YAML has 8 and 2
BATCHES: list[tuple[dict[str, Any], list[str], int, int, int]] = [
    ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2}, [], 4, 24, 3),
    ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 3}, [], 4, 24, 3),
    ({"train_batch_size": 24, "gradient_accumulation_steps": 2}, [], 4, 24, 3),
    ({"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2}, [], 4, 24, 3),
    ({"train_batch_size": 24}, [], 4, 24, 6),
    ({"train_micro_batch_size_per_gpu": 3}, [], 4, 12, 3),
    ({"gradient_accumulation_steps": 3}, [], 4, 24, 2),
    ({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 1}, [], 4, 8, 1),
    ({"train_batch_size": 16, "train_micro_batch_size_per_gpu": "auto"}, [], 4, 16, 2),
    (
        {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": 3,
        },
        [],
        4,
        24,
        2,
    ),
    ({"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2}, ["parallel.tp=2"], 4, 12, 3),
    ({"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2}, ["parallel.pp=4"], 8, 12, 3),
    (
        {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 5},
        ["train.global_batch_size=48"],
        4,
        48,
        3,
    ),
    (
        {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 5, "gradient_accumulation_steps": 5},
        ["train.micro_batch_size=6"],
        4,
        24,
        6,
    ),
    (
        {"train_micro_batch_size_per_gpu": 5, "gradient_accumulation_steps": 2},
        ["train.micro_batch_size=3"],
        4,
        24,
        3,
    ),
]


@pytest.mark.parametrize(("document", "overrides", "world_size", "batch", "micro"), BATCHES)
def test_batch_sizes(
    document: dict[str, Any], overrides: list[str], world_size: int, batch: int, micro: int, case: Case
) -> None:
    config = case.load(document, overrides, world_size=world_size)
    assert (config.train.global_batch_size, config.train.micro_batch_size) == (batch, micro)
    assert set(document) <= set(by_key(case.read(document, overrides, world_size=world_size)))


def test_the_batch_may_stand_in_deepspeeds_file_alone(case: Case) -> None:
    yaml = MODEL + "train: {seq_len: 32, num_steps: 2000}\n"
    document = {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 3}
    assert case.load(document, yaml=yaml).train.global_batch_size == 24
    with pytest.raises(ConfigError, match=r"train\.global_batch_size"):
        case.load({"train_batch_size": "auto"}, yaml=yaml)


CONTRADICTIONS = [(32, 4, 2, 12, 3, {36, 24}), (48, 4, 2, 12, 3, {48, 60, 36, 24}), (7, 4, 1, 4, 4, {16})]


@pytest.mark.parametrize(("train", "micro", "steps", "world_size", "dp", "near"), CONTRADICTIONS)
def test_contradictory_batch_sizes(
    train: int, micro: int, steps: int, world_size: int, dp: int, near: set[int], case: Case
) -> None:
    tp = world_size // dp
    document = {
        "train_batch_size": train,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
    }
    (problem,) = case.problems(document, [f"parallel.tp={tp}"], world_size=world_size)
    assert problem.key == "train_batch_size" and problem.value == train
    assert f"= {micro} * {steps} * {dp} = {micro * steps * dp}" in problem.rule
    assert problem.fixes
    for fix in problem.fixes:
        size = int(fix[0].removeprefix("train.global_batch_size="))
        assert size in near
        config = case.load(document, [f"parallel.tp={tp}", *fix], world_size=world_size)
        assert config.train.global_batch_size == size
        assert f"{size} with gradient_accumulation_steps {size // (micro * dp)}" in problem.remedy
    document["train_batch_size"] = micro * steps * dp
    assert case.problems(document, [f"parallel.tp={tp}"], world_size=world_size) == [], "negative control"


def test_dp_is_said_where_processes_are_unknown(case: Case) -> None:
    reading = case.read({"train_micro_batch_size_per_gpu": 4}, world_size=None)
    assert reading.overrides == ("train.micro_batch_size=4", "train.global_batch_size=4") or set(reading.overrides) == {
        "train.micro_batch_size=4",
        "train.global_batch_size=4",
    }
    assert "is not known" in by_key(reading)["train_batch_size"].note


def test_a_batch_that_leaves_a_rest(case: Case) -> None:
    """DeepSpeed would infer a micro batch of 24 // 20 = 1, and then stop: 1 * 5 * 4 is not 24."""
    (problem,) = case.problems({"train_batch_size": 24, "gradient_accumulation_steps": 5})
    assert "5 * 4 = 20" in problem.rule
    assert problem.fixes == (("train.global_batch_size=20",), ("train.global_batch_size=40",))
    for fix in problem.fixes:
        assert case.problems({"train_batch_size": 24, "gradient_accumulation_steps": 5}, fix) == []
    with pytest.raises(ConfigError, match=r"ds_config\.json: train_batch_size"):
        case.load({"train_batch_size": 10})  # left to the rule of the batch, which names the file


def test_two_sizes_that_contradict_one_another(case: Case) -> None:
    document: dict[str, Any] = {"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4}
    (problem,) = case.problems(document, world_size=2)
    assert problem.key == "train_batch_size" and problem.value == 10 and problem.origin == str(case.json)
    assert "train_micro_batch_size_per_gpu * dp = 4 * 2 = 8" in problem.rule
    assert problem.fixes == (("train.global_batch_size=8",), ("train.global_batch_size=16",))
    for fix in problem.fixes:
        assert case.problems(document, fix, world_size=2) == []
    assert case.problems(document, ["train.micro_batch_size=5"], world_size=2) == [], "which replaces the file's"
    assert case.problems(document | {"train_batch_size": 16}, world_size=2) == [], "negative control"


# (keys of the file, overrides, what the line of train_batch_size says)
WORDS: list[tuple[dict[str, Any], list[str], str]] = [
    ({"gradient_accumulation_steps": 3}, [], "gradient_accumulation_steps, with train.micro_batch_size=2 of the YAML"),
    (
        {"gradient_accumulation_steps": 3},
        ["train.micro_batch_size=4"],
        "gradient_accumulation_steps, with train.micro_batch_size=4 of the command line",
    ),
    ({"train_micro_batch_size_per_gpu": 3}, [], "train_micro_batch_size_per_gpu"),
    (
        {"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2},
        [],
        "train_micro_batch_size_per_gpu and gradient_accumulation_steps",
    ),
]


@pytest.mark.parametrize(("document", "overrides", "says"), WORDS)
def test_an_inferred_batch_says_what_it_is_from(
    document: dict[str, Any], overrides: list[str], says: str, case: Case
) -> None:
    note = by_key(case.read(document, overrides))["train_batch_size"].note
    assert note.startswith(f"inferred from {says}, with dp = 4")
