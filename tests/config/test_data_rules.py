"""Sources, weights and splits: what is accepted, and what is said about the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lite.config import ConfigError, Problem, load_config
from megatron_lite.config.load import to_yaml

GOOD = """\
model: {family: llama, vocab_size: 97, hidden_size: 64, num_layers: 4, num_heads: 8, num_kv_heads: 4, max_seq_len: 64}
train: {seq_len: 32, micro_batch_size: 2, global_batch_size: 8, num_steps: 50}
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD, encoding="utf-8")
    return path


def problems_of(path: Path, text: str, files_exist: bool = False) -> list[Problem]:
    try:
        load_config(path, text.split(), files_exist=files_exist)
    except ConfigError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize(
    "text",
    [
        "data.train=[a,b] data.train_weights=[0.7,0.3]",
        "data.train=[a,b] data.train_weights=[7,3]",  # of any sum
        "data.train=a data.train_weights=[1]",
        "data.train=[a,b]",
        "data.train=a data.split=[0.98,0.01,0.01]",
        "data.train=a data.split=[0.333333,0.333333,0.333333]",
        "data.train=a data.split=[1,0,0] data.valid=v data.test=t",
        "data.train=a data.split=[0.9,0,0.1] data.valid=v",
        "data.train=a data.split=[0.9,0.1,0.0] train.eval_interval=5",
        "data.train=a data.valid=v data.test=[t,u] data.cache=/tmp/cache train.eval_interval=5",
    ],
)
def test_legal(good: Path, text: str, tmp_path: Path) -> None:
    config = load_config(good, text.split())
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path).data == config.data


# (overrides, key, the fixes offered)
BROKEN: list[tuple[str, str, list[str]]] = [
    ("data.train=[a,b] data.train_weights=[1]", "data.train_weights", ["data.train_weights=[1.0,1.0]"]),
    ("data.train=[a,b] data.train_weights=[1]", "data.train_weights", ["data.train_weights=[]"]),
    ("data.train=[a,b] data.train_weights=[3,2,1]", "data.train_weights", ["data.train_weights=[3.0,2.0]"]),
    ("data.train=[a,b] data.train_weights=[0.5,0]", "data.train_weights", []),
    ("data.train=[a,b] data.train_weights=[0.5,-1]", "data.train_weights", []),
    ("data.train=a data.train_weights=0.5", "data.train_weights", []),
    ("data.train=a data.split=[0.9,0.05,0.04]", "data.split", []),
    ("data.train=a data.split=[969,30,1]", "data.split", ["data.split=[0.969,0.03,0.001]"]),
    ("data.train=a data.split=[0,0.5,0.3]", "data.split", ["data.split=[0.2,0.5,0.3]"]),
    ("data.train=a data.split=[0,0.5,0.5]", "data.split", []),
    ("data.train=a data.split=[0.9,0.1]", "data.split", ["data.split=[0.9,0.1,0.0]"]),
    ("data.train=a data.split=[1.1,-0.1,0]", "data.split", []),
    ("data.train=a data.split=[0.9,0.1,0] data.valid=v", "data.valid", ["data.valid=[]", "data.split=[1.0,0.0,0.0]"]),
    ("data.train=a data.split=[0.8,0.1,0.1] data.test=t", "data.test", ["data.split=[0.9,0.1,0.0]"]),
    ("data.train=a data.split=[0.9,0,0.1] train.eval_interval=5", "train.eval_interval", ["train.eval_interval=0"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "key", "offered"), BROKEN)
def test_broken_rules_and_fixes_that_mend_them(good: Path, text: str, key: str, offered: list[str]) -> None:
    problems = problems_of(good, text)
    assert [problem.key for problem in problems] == [key]
    (problem,) = problems
    fixes = [" ".join(fix) for fix in problem.fixes]
    assert set(offered) <= set(fixes)
    assert fixes or problem.remedy
    for fix in fixes:
        assert problems_of(good, f"{text} {fix}") == [], fix


def test_a_file_in_place_of_the_cache(good: Path, tmp_path: Path) -> None:
    for name in ("a.bin", "a.idx"):
        (tmp_path / name).write_bytes(b"")
    text = f"data.train={tmp_path}/a data.cache="
    assert [problem.key for problem in problems_of(good, f"{text}{good}", files_exist=True)] == ["data.cache"]
    assert problems_of(good, f"{text}{tmp_path}/new", files_exist=True) == []


def test_files_of_every_part_have_to_be_there(good: Path, tmp_path: Path) -> None:
    text = " ".join(f"data.{part}={tmp_path}/no" for part in ("train", "valid", "test"))
    assert [problem.key for problem in problems_of(good, text, files_exist=True)] == [
        "data.train",
        "data.valid",
        "data.test",
    ]
