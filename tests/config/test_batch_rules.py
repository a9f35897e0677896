"""Batch-size ramp-up: sizes by samples consumed, and what is said about a ramp that no step can have."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lite.config import ConfigError, Problem, RunConfig, load_config
from megatron_lite.config.batch_rampup import batch_size_at, batch_sizes, samples_after, with_batch_size
from megatron_lite.config.load import to_yaml

GOOD = """\
model: {family: llama, vocab_size: 97, hidden_size: 64, num_layers: 4, num_heads: 8, num_kv_heads: 4, max_seq_len: 64}
train: {seq_len: 32, micro_batch_size: 2, global_batch_size: 32, num_steps: 50}
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD, encoding="utf-8")
    return path


def config_of(path: Path, text: str) -> RunConfig:
    return load_config(path, text.split(), world_size=1)


def problems_of(path: Path, text: str, world_size: int | None = None) -> list[Problem]:
    try:
        load_config(path, text.split(), world_size=world_size)
    except ConfigError as error:
        return list(error.problems)
    return []


# Worked out by hand: 3 increments of 8 over 100 samples, so the size changes at 33 1/3, 66 2/3 and 100.
BY_HAND = {0: 8, 1: 8, 33: 8, 34: 16, 66: 16, 67: 24, 99: 24, 100: 32, 101: 32, 10**12: 32}


def test_sizes_by_hand(good: Path) -> None:
    train = config_of(good, "train.batch_rampup=[8,8,100]").train
    assert {samples: batch_size_at(train, samples) for samples in BY_HAND} == BY_HAND
    assert [*batch_sizes(train)] == [8, 16, 24, 32]
    # Steps of 8 begin after 0, 8, 16, 24 and 32 samples, of 16 after 40 and 56, of 24 after 72 and 96; then 32.
    assert [samples_after(train, steps) for steps in range(12)] == [0, 8, 16, 24, 32, 40, 56, 72, 96, 120, 152, 184]
    assert samples_after(train, 2, samples=72) == 120 and samples_after(train, 3, samples=500) == 596


def test_without_a_ramp_there_is_one_size(good: Path) -> None:
    train = config_of(good, "").train
    assert {batch_size_at(train, samples) for samples in (0, 1, 10**12)} == {32} == {*batch_sizes(train)}
    assert samples_after(train, 3, samples=5) == 101


def megatron_lm(start: int, increment: int, over_samples: int, full: int, consumed: int) -> int:
    """The rule of Megatron-LM's --rampup-batch-size (megatron/core/num_microbatches_calculator.py), in floats."""
    samples_per_increment = over_samples / ((full - start) // increment)
    return full if consumed > over_samples else start + int(consumed / samples_per_increment) * increment


@pytest.mark.parametrize("ramp", [(8, 8, 96), (2, 2, 75), (16, 16, 1024), (2, 6, 5000), (4, 28, 3), (2, 2, 7)])
def test_sizes_are_megatron_lms(good: Path, ramp: tuple[int, int, int]) -> None:
    """These divide evenly, or so that no quotient of theirs is rounded across a whole number."""
    train = config_of(good, f"train.batch_rampup=[{','.join(map(str, ramp))}]").train
    places = range(ramp[2] + 40)
    ours = [batch_size_at(train, consumed) for consumed in places]
    assert ours == [megatron_lm(*ramp, 32, consumed) for consumed in places]
    assert {ours[0], ours[-1]} == {ramp[0], 32} and ours == sorted(ours)
    # Negative control: a size that is decided at the end of a batch, not at its beginning, is another one.
    assert ours != [batch_size_at(train, consumed + ours[consumed]) for consumed in places]


def test_a_config_of_one_size(good: Path) -> None:
    config = config_of(good, "train.batch_rampup=[8,8,100]")
    assert (config.num_microbatches, with_batch_size(config, 8).num_microbatches) == (16, 4)
    assert with_batch_size(config, 32) == config_of(good, "")


def test_it_is_written_and_read_again(good: Path, tmp_path: Path) -> None:
    config = config_of(good, "train.batch_rampup=[8,8,100] train.embedding_gradient_scale=0.1")
    (tmp_path / "again.yaml").write_text(to_yaml(config), encoding="utf-8")
    again = load_config(tmp_path / "again.yaml").train
    assert again == config.train
    assert (again.batch_rampup, again.embedding_gradient_scale) == ((8, 8, 100), 0.1)


LEGAL = [
    ("[8,8,100]", 1),
    ("[8,8,100]", 4),
    ("[2,30,1]", 1),
    ("[30,2,1]", 1),
    ("[2,6,1000000000000]", 1),
    ("null", 8),
]


@pytest.mark.parametrize(("ramp", "world_size"), LEGAL)
def test_legal(good: Path, ramp: str, world_size: int) -> None:
    assert problems_of(good, f"train.batch_rampup={ramp}", world_size) == []


# (overrides, processes, words of the rule, fixes offered)
BROKEN = [
    ("train.batch_rampup=[2,4,100]", None, "in whole increments, 30 is to be added", ["[2,6,100]"]),
    ("train.batch_rampup=[2,8,100]", None, "in whole increments", ["[2,6,100]", "[2,10,100]"]),
    ("train.batch_rampup=[32,8,100]", None, "start below train.global_batch_size = 32", ["[24,8,100]"]),
    ("train.batch_rampup=[64,8,100]", None, "start below", ["[24,8,100]"]),
    ("train.batch_rampup=[3,1,100]", None, "divisible by train.micro_batch_size = 2", ["[4,2,100]", "[2,2,100]"]),
    ("train.batch_rampup=[4,4,100]", 4, "train.micro_batch_size * dp = 2 * 4 = 8", ["[8,8,100]"]),
    ("train.batch_rampup=[8,4,100]", 4, "increment divisible", ["[8,8,100]"]),
    ("train.batch_rampup=[5,7,100]", 4, "whole increments, 27 is to be added; must have", ["[8,8,100]"]),
    ("train.batch_rampup=[32,8,9]", 16, "start below", ["null"]),
    ("train.batch_rampup=[0,8,9]", None, "must be a list of 3 integers or null", ["null"]),
    ("train.batch_rampup=[4,4]", None, "must be a list of 3 integers or null", ["[4,4,1000]"]),
    ("train.batch_rampup=[8,8,9.5]", None, "must be a list of 3 integers or null", ["null"]),
    ("train.batch_rampup=8", None, "must be a list of 3 integers or null", ["[8,8,1000]"]),
    ("train.batch_rampup=[8,8,9] parallel.schedule=mine.csv", None, "is for one number", ["null"]),
]


@pytest.mark.parametrize(("text", "world_size", "words", "offered"), BROKEN)
def test_broken_ramps_and_fixes_that_mend_them(
    good: Path, text: str, world_size: int | None, words: str, offered: list[str]
) -> None:
    (problem,) = problems_of(good, text, world_size)
    assert problem.key == "train.batch_rampup" and words in problem.rule
    assert {f"train.batch_rampup={one}" for one in offered} <= {fix for (fix,) in problem.fixes}
    for (fix,) in problem.fixes:
        assert problems_of(good, f"{text} {fix}", world_size) == [], fix


def test_a_batch_that_is_wrong_itself_is_told_alone(good: Path) -> None:
    problems = problems_of(good, "train.global_batch_size=31 train.batch_rampup=[3,4,9]")
    assert [problem.key for problem in problems] == ["train.global_batch_size"]


def test_a_layout_that_the_ramp_can_have_is_preferred(good: Path) -> None:
    """With dp = 8 a step has at least 16 sequences: the full batch fits that, the start of the ramp does not."""
    wrong, ramp = "parallel.dp=2", "train.batch_rampup=[8,8,9]"
    (problem,), (with_ramp,) = problems_of(good, wrong, 8), problems_of(good, f"{wrong} {ramp}", 8)
    assert ("parallel.dp=8",) in problem.fixes and ("parallel.dp=8",) not in with_ramp.fixes
    assert with_ramp.key == "parallel.dp" and with_ramp.fixes
    for fix in with_ramp.fixes:
        assert problems_of(good, " ".join((wrong, ramp, *fix)), 8) == []


@pytest.mark.parametrize("value", ["0", "-0.1", "true"])
def test_a_scale_is_positive(good: Path, value: str) -> None:
    (problem,) = problems_of(good, f"train.embedding_gradient_scale={value}")
    assert problem.key == "train.embedding_gradient_scale" and "number > 0" in problem.rule
