"""Optimizers and schedulers of a DeepSpeed config, and their traps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_lite.optim.lr_schedule import learning_rate
from tests.config.deepspeed_cases import GOOD, LEARNING_RATES, Case, by_key


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


# (optimizer, YAML's optim, overrides that must come out, of optim.*)
OPTIMIZERS: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({"type": "adam", "params": {"lr": 1e-3, "adam_w_mode": True}}, {"name": "adamw", "lr": "0.001"}),
    ({"type": "Adam", "params": {"adam_w_mode": False, "weight_decay": 0}}, {"name": "adamw", "weight_decay": "0.0"}),
    ({"type": "AdamW", "params": {"adam_w_mode": False, "weight_decay": 0.1}}, {"weight_decay": "0.1"}),
    ({"type": "Adam", "adam_w_mode": False, "params": {"weight_decay": 0.1}}, {"name": "adamw", "weight_decay": "0.1"}),
    ({"type": "Lion", "params": {"lr": 1e-4, "betas": [0.9, 0.99]}}, {"name": "lion", "beta2": "0.99"}),
    (
        {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "nesterov": True}},
        {"name": "sgd", "lr": "0.1", "momentum": "0.9", "nesterov": "true", "weight_decay": "0.0"},
    ),
    (
        {"type": "Muon", "params": {"lr": 0.02, "adam_lr": 3e-4, "momentum": 0.95, "ns_method": "gram"}},
        {"name": "muon", "lr": "0.0003", "momentum": "0.95", "eps": "1.0e-10", "beta2": "0.95"},
    ),
    ({"type": "Adafactor", "params": {"lr": 0.01, "beta2_decay": -0.8}}, {"name": "adafactor", "lr": "0.01"}),
    ({"type": "AdamW"}, {"name": "adamw", "lr": "0.001", "beta2": "0.999"}),
]


@pytest.mark.parametrize(("optimizer", "expected"), OPTIMIZERS, ids=lambda value: str(value.get("type", "")))
def test_optimizers(optimizer: dict[str, Any], expected: dict[str, str], case: Case) -> None:
    reading = case.read({"optimizer": optimizer})
    got = dict(text.removeprefix("optim.").split("=") for text in reading.overrides)
    assert expected.items() <= got.items()
    assert {f"optimizer.params.{name}" for name in optimizer.get("params", {})} <= {line.key for line in reading.lines}


def test_settings_of_another_optimizer_are_not_taken(case: Case) -> None:
    document = {"optimizer": {"type": "Lion", "params": {"lr": 1e-5, "betas": [0.8, 0.7]}}}
    config = case.load(document, ["optim.name=adamw", "optim.lr=2e-3"])
    assert (config.optim.lr, config.optim.beta1, config.optim.beta2) == (2e-3, 0.9, 0.95)
    lines = by_key(case.read(document, ["optim.name=adamw"]))
    assert lines["optimizer.type"].status == lines["optimizer.params.lr"].status == "ignored"


def test_adam_with_l2_is_refused_with_what_lifts_it(case: Case) -> None:
    document = {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False, "weight_decay": 0.1}}}
    (problem,) = case.problems(document)
    assert problem.key == "optimizer.params.adam_w_mode" and "L2" in problem.rule
    for fix in problem.fixes:
        assert case.problems(document, fix) == []


# What DeepSpeed 0.19.6's schedulers give steps 1 to 16, with highest value 1, warm-up 4, end 12 (run with
# torch.optim.Adam and one scheduler.step after each step, as its engine does), and the steps by which ours is earlier:
# in the warm-up, and after it.
SCHEDULES: list[tuple[str, dict[str, Any], list[float], int, int]] = [
    (
        "WarmupLR",
        {"warmup_max_lr": 1.0, "warmup_num_steps": 4, "warmup_type": "linear"},
        [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0],
        2,
        2,
    ),
    (
        "WarmupDecayLR",
        {"total_num_steps": 12, "warmup_max_lr": 1.0, "warmup_num_steps": 4, "warmup_type": "linear"},
        [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0, 0.0, 0.0],
        2,
        2,
    ),
    (
        "WarmupCosineLR",
        {"total_num_steps": 12, "warmup_num_steps": 4, "warmup_type": "linear", "cos_min_ratio": 0.1},
        [0, 0, 0.25, 0.5, 0.75, 0.9657, 0.8682, 0.7222, 0.55, 0.3778, 0.2318, 0.1343, 0.1, 0.1, 0.1, 0.1],
        2,
        1,
    ),
    (
        "OneCycle",
        {"cycle_min_lr": 0.1, "cycle_max_lr": 1.0, "cycle_first_step_size": 4, "cycle_second_step_size": 8},
        [0.1, 0.325, 0.55, 0.775, 1, 0.8875, 0.775, 0.6625, 0.55, 0.4375, 0.325, 0.2125, 0.1, 0.1, 0.1, 0.1],
        1,
        1,
    ),
]


@pytest.mark.parametrize(("kind", "params", "theirs", "warmup_lag", "lag"), SCHEDULES)
def test_schedulers(
    kind: str, params: dict[str, Any], theirs: list[float], warmup_lag: int, lag: int, case: Case
) -> None:
    document = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1.0}},
        "scheduler": {"type": kind, "params": params},
    }
    optim = case.load(document).optim
    ours = [learning_rate(optim, step, 2000) for step in range(1, 17)]
    peak = 4 + warmup_lag  # the step at which DeepSpeed's warm-up would end
    rounding = 5e-5  # theirs are written with four digits
    if kind != "OneCycle":  # which starts at its lower end, as the line says
        assert theirs[warmup_lag : peak - 1] == pytest.approx(ours[:3], abs=rounding)
    assert theirs[4 + lag :] == pytest.approx(ours[4 : len(theirs) - lag], abs=rounding)
    assert theirs[4:] != pytest.approx(ours[4 : len(theirs)], abs=rounding) or kind == "WarmupLR", "negative control"


def test_traps_of_schedulers(case: Case) -> None:
    adam = {"type": "AdamW", "params": {"lr": 5e-5}}
    lines = by_key(case.read({"optimizer": adam, "scheduler": {"type": "WarmupLR", "params": {}}}))
    assert lines["optimizer.params.lr"].status == "ignored"
    assert lines["scheduler.params.warmup_max_lr"].ours == ("optim.lr=0.001",)
    kept = by_key(case.read({"optimizer": adam}))["scheduler"]
    assert kept.status == "kept" and "optim.schedule=cosine stays" in kept.note
    auto = {"type": "WarmupDecayLR", "params": {"warmup_max_lr": "auto", "total_num_steps": "auto"}}
    config = case.load({"optimizer": adam, "scheduler": auto})
    assert (config.optim.lr, config.optim.min_lr, config.optim.decay_steps) == (5e-5, 0.0, 2000)


@pytest.mark.parametrize(("optimizer_lr", "scheduler", "overrides", "lr"), LEARNING_RATES)
def test_which_learning_rate_counts(
    optimizer_lr: object, scheduler: dict[str, Any], overrides: list[str], lr: float, case: Case
) -> None:
    """The YAML has 0.0002, which a file that gives a learning rate of its own replaces in any case."""
    params = {} if optimizer_lr is None else {"lr": optimizer_lr}
    document = {"optimizer": {"type": "AdamW", "params": params}, "scheduler": scheduler}
    yaml = GOOD + "optim: {lr: 2e-4, min_lr: 0}\n"
    assert case.load(document, overrides, yaml=yaml).optim.lr == lr
    by_key(case.read(document, overrides, yaml=yaml))


def test_a_cycle_without_its_highest_rate_is_refused_as_deepspeed_refuses_it(case: Case) -> None:
    params: dict[str, Any] = {"cycle_min_lr": 0.0}
    document = {
        "optimizer": {"type": "AdamW", "params": {"lr": 5e-5}},
        "scheduler": {"type": "OneCycle", "params": params},
    }
    assert [problem.key for problem in case.problems(document)] == ["scheduler.params.cycle_max_lr"]
    params["cycle_max_lr"] = 4e-4
    assert case.load(document, ["train.num_steps=9999"]).optim.lr == 4e-4


def test_products_are_written_without_noise(case: Case) -> None:
    """0.1 * 3e-4 is 2.9999999999999997e-05 in fp64."""
    scheduler = {"type": "WarmupCosineLR", "params": {"total_num_steps": 2000, "cos_min_ratio": 0.1}}
    document = {"optimizer": {"type": "AdamW", "params": {"lr": 3e-4}}, "scheduler": scheduler}
    assert "optim.min_lr=3.0e-05" in case.read(document).overrides
