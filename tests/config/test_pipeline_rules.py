"""What the pipeline keys mean, and what is said of the files that they name. Refusals are cases of test_errors.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_lite.config import ConfigError, ParallelConfig, Problem, RunConfig, load_config
from megatron_lite.config.layer_costs import read_layer_costs
from megatron_lite.config.load import to_yaml
from megatron_lite.config.schedules import SCHEDULE_RULES

KEYS = (
    "model.family=llama",
    "model.vocab_size=97",
    "model.hidden_size=64",
    "model.num_layers=6",
    "model.num_heads=8",
    "model.max_seq_len=64",
    "train.seq_len=32",
    "train.global_batch_size=8",
    "train.num_steps=50",
)


def load(*keys: str, world_size: int | None = None, files_exist: bool = False) -> RunConfig:
    return load_config(None, [*KEYS, *keys], world_size=world_size, files_exist=files_exist)


def problems(*keys: str, world_size: int | None = None, files_exist: bool = False) -> list[Problem]:
    try:
        load(*keys, world_size=world_size, files_exist=files_exist)
    except ConfigError as error:
        return [problem for problem in error.problems if problem.key.startswith(("parallel.", "train."))]
    return []


@pytest.mark.parametrize("schedule", SCHEDULE_RULES)
def test_a_schedule_brings_the_virtual_stages_that_it_needs(schedule: str) -> None:
    parallel = load(f"parallel.schedule={schedule}", "parallel.pp=2", "train.global_batch_size=64").parallel
    expected = 2 if schedule in ("interleaved", "breadth-first", "zb-v", "dualpipe-v") else 1
    assert parallel.virtual_stages == ParallelConfig(schedule=schedule).virtual_stages == expected
    assert parallel.num_chunks == 2 * expected


def test_a_schedule_file_takes_any_virtual_stages() -> None:
    for chunks in (1, 2, 3):
        parallel = load("parallel.schedule=mine.csv", "parallel.pp=2", f"parallel.virtual_stages={chunks}").parallel
        assert (parallel.schedule, parallel.num_chunks) == ("mine.csv", 2 * chunks)


def test_recompute_is_for_all_stages_or_for_each() -> None:
    for given, expected in (("full", ["full"] * 3), ("[full]", ["full"] * 3), ("[none,selective,full]", None)):
        parallel = load("parallel.pp=3", f"parallel.recompute={given}").parallel
        assert [parallel.recompute_of(stage) for stage in range(3)] == (expected or ["none", "selective", "full"])
    assert load().parallel.recompute_of(0) == "none"


def test_pipeline_keys_survive_the_saved_config(tmp_path: Path) -> None:
    config = load(
        "parallel.pp=2", "parallel.schedule=zb-v", "parallel.stage_layers=[1,2,2,1]", "parallel.recompute=[full,none]"
    )
    path = tmp_path / "saved.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path).parallel == config.parallel


def test_the_chunks_that_would_be_empty_are_named() -> None:
    (problem,) = problems("parallel.pp=2", "parallel.schedule=zb-v", "parallel.stage_layers=[3,0,3,0]")
    assert "chunks 1 and 3, counted from 0, would be empty" in problem.rule
    (problem,) = problems("parallel.pp=2", "parallel.stage_layers=[0,5]")
    assert "stage 0, counted from 0, would be empty" in problem.rule and "adds up to 5" in problem.rule


def test_all_problems_of_a_pipeline_come_at_once() -> None:
    found = problems(
        "parallel.pp=2",
        "parallel.virtual_stages=2",
        "parallel.partition=cost",
        "parallel.stage_layers=[3,3]",
        "parallel.recompute=[none,none,none]",
        "parallel.recompute_layers=2",
    )
    assert [problem.key for problem in found] == [
        "parallel.virtual_stages",
        "parallel.partition",
        "parallel.recompute",
        "parallel.recompute_layers",
    ], "and nothing of the split, which follows from the virtual stages"


@pytest.mark.parametrize("schedule", SCHEDULE_RULES)
def test_following_the_advice_ends_at_a_config_that_loads(schedule: str) -> None:
    refused = 0
    for pp in (1, 2, 3, 4, 7):
        for chunks in (None, 1, 2, 3):
            for world in (None, 8):
                keys = [f"parallel.schedule={schedule}", f"parallel.pp={pp}"]
                keys += [f"parallel.virtual_stages={chunks}"] * (chunks is not None)
                for _ in range(6):
                    found = problems(*keys, world_size=world)
                    refused += bool(found)
                    if not found:
                        break
                    assert found[0].fixes, str(found[0])
                    keys += found[0].fixes[0]
                assert not found, f"{keys}: {found}"
    assert refused > 5


def test_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "schedule.csv").write_text("", encoding="utf-8")
    (tmp_path / "costs.json").write_text('{"layer": 1, "embedding": 0, "head": 2}', encoding="utf-8")
    wrong = (f"parallel.schedule={tmp_path}/shedule.csv", f"parallel.partition={tmp_path}/cost.json")
    right = (f"parallel.schedule={tmp_path}/schedule.csv", f"parallel.partition={tmp_path}/costs.json")
    assert problems(*wrong) == problems(*right, files_exist=True) == [], "a config can be read on another machine"
    found = problems(*wrong, files_exist=True)
    assert [(p.key, p.rule, p.fixes[0]) for p in found] == [
        ("parallel.schedule", "there is no such file", right[:1]),
        ("parallel.partition", "there is no such file", right[1:]),
    ]


def test_a_file_of_costs_that_does_not_fit_the_model_is_refused_before_the_start(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text('{"layer": [1, 1, 1], "embedding": 0, "head": 2}', encoding="utf-8")
    (problem,) = problems(f"parallel.partition={path}", files_exist=True)
    assert problem.key == "parallel.partition" and "each of the 6 layers" in problem.rule and "has 3" in problem.rule
    assert problem.fixes == (("parallel.partition=cost",),)


def test_costs_are_read(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text('{"layer": 0.5, "embedding": 0, "head": 2}', encoding="utf-8")
    costs = read_layer_costs(path, 3)
    assert (costs.layers, costs.embedding, costs.head) == ((0.5, 0.5, 0.5), 0.0, 2.0)
    path.write_text('{"head": 2, "layer": [1, 2, 3], "embedding": 0.1}', encoding="utf-8")
    assert read_layer_costs(path, 3).layers == (1.0, 2.0, 3.0)


GOOD: dict[str, object] = {"layer": 1, "embedding": 0, "head": 2}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not JSON"),
        ("[1, 2]", "has list"),
        ("{}", "has the keys (none)"),
        (json.dumps({"layer": 1, "head": 2}), "has the keys layer, head"),
        (json.dumps(GOOD | {"tail": 1}), "has the keys layer, embedding, head, tail"),
        (json.dumps(GOOD | {"layer": "1"}), 'layer must be a number of seconds above 0, is "1"'),
        (json.dumps(GOOD | {"layer": 0}), "layer must be a number of seconds above 0, is 0"),
        (json.dumps(GOOD | {"layer": [1, -1, 1]}), "layer[1] must be a number of seconds above 0, is -1"),
        (json.dumps(GOOD | {"layer": [1, 1]}), "each of the 3 layers"),
        (json.dumps(GOOD | {"head": -1}), "head must be a number of seconds of at least 0, is -1"),
        (json.dumps(GOOD | {"embedding": True}), "embedding must be a number of seconds of at least 0, is true"),
        (json.dumps(GOOD | {"head": float("nan")}), "head must be a number of seconds of at least 0, is NaN"),
        (json.dumps(GOOD | {"head": 10**400}), "head must be a number"),
    ],
)
def test_costs_that_are_none(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "costs.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        read_layer_costs(path, 3)
    assert says in str(caught.value) and str(path) in str(caught.value)
