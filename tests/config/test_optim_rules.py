"""What an optimizer needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lite.config import load_config
from tests.config.test_data_rules import GOOD, problems_of


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["sgd", "muon"])
def test_nesterov_needs_momentum(good: Path, name: str) -> None:
    broken = f"optim.name={name} optim.nesterov=true optim.momentum=0"
    (problem,) = problems_of(good, broken)
    assert problem.key == "optim.nesterov" and problem.rule == "looks ahead along a momentum, and optim.momentum = 0"
    for fix in problem.fixes:
        keys = {override.partition("=")[0] for override in fix}
        kept = [given for given in broken.split() if given.partition("=")[0] not in keys]
        assert problems_of(good, " ".join([*kept, *fix])) == []


def test_what_is_legal(good: Path) -> None:
    assert problems_of(good, "optim.name=sgd optim.momentum=0") == []
    assert problems_of(good, "optim.momentum=0 optim.nesterov=true") == [], "adamw reads neither"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("optim.name=adam", "optim.name"),
        ("optim.momentum=-1", "optim.momentum"),
        ("optim.newton_schulz_steps=0", "optim.newton_schulz_steps"),
        ("optim.newton_schulz_dtype=fp16", "optim.newton_schulz_dtype"),
    ],
)
def test_bounds(good: Path, text: str, key: str) -> None:
    (problem,) = problems_of(good, text)
    assert problem.key == key and problem.fixes
    assert problems_of(good, " ".join(problem.fixes[0])) == []


@pytest.mark.parametrize(
    ("text", "nesterov"),
    [
        ("optim.name=muon", True),
        ("optim.name=muon optim.momentum=0", False),
        ("optim.name=sgd", False),
        ("optim.name=sgd optim.momentum=0.5", False),
        ("optim.name=muon optim.nesterov=false", False),
    ],
)
def test_nesterov_that_nobody_gave_follows_from_the_momentum(good: Path, text: str, nesterov: bool) -> None:
    assert load_config(good, text.split()).optim.nesterov is nesterov


@pytest.mark.parametrize(
    ("name", "key", "usual"),
    [
        ("lion", "lr", "0.0001"),
        ("lion", "weight_decay", "0"),  # the bound is nearer than the usual value
        ("sgd", "lr", "0.1"),
        ("adafactor", "eps", "1.0e-30"),
        ("lion", "beta2", "0"),
        ("adamw", "lr", "0.0003"),
    ],
)
def test_advice_is_the_optimizers_own(good: Path, name: str, key: str, usual: str) -> None:
    (problem,) = problems_of(good, f"optim.name={name} optim.{key}=-1")
    assert problem.fixes == ((f"optim.{key}={usual}",),)


def test_advice_of_an_optimizer_that_nobody_knows_is_adamws(good: Path) -> None:
    for name in ("x", "[lion]"):
        found = {problem.key: problem.fixes for problem in problems_of(good, f"optim.name={name} optim.lr=-1")}
        assert found["optim.lr"] == (("optim.lr=0.0003",),)
