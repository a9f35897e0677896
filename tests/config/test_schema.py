"""The models of the schema: strict, frozen, described, and with their defaults filled in."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from megatron_lite.config import (
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    key_help,
    with_world,
)
from megatron_lite.config.keys import iter_fields, leaf_fields, takes

MODEL: dict[str, Any] = {
    "family": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "num_layers": 4,
    "num_heads": 8,
    "max_seq_len": 64,
}
TRAIN: dict[str, Any] = {"seq_len": 32, "global_batch_size": 8, "num_steps": 50}


def test_every_key_has_a_sentence_and_a_default_that_it_takes() -> None:
    fields = dict(iter_fields())
    assert len(fields) > 50
    for key, field in fields.items():
        assert field.description and len(field.description) > 8, f"{key} has no description"
    for key, field in leaf_fields().items():
        if field.default_factory is None and not field.is_required():
            assert takes(field, field.default), f"{key} does not take its own default"


def test_key_help_lists_every_key_once() -> None:
    rows = key_help()
    assert [row.key for row in rows] == list(leaf_fields())
    assert all(all(row) for row in rows), "a column is empty"
    by_key = {row.key: row for row in rows}
    assert by_key["model.vocab_size"].default == "required"
    assert by_key["parallel.tp"].type == "integer >= 1"
    assert by_key["train.precision"].type == "one of fp32, bf16, fp16, fp64"
    assert by_key["model.num_kv_heads"].default == "num_heads"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"num_kv_heads": 8, "head_dim": 8, "ffn_hidden_size": 192, "tie_embeddings": False}),
        ({"family": "gpt2"}, {"num_kv_heads": 8, "head_dim": 8, "ffn_hidden_size": 256, "tie_embeddings": True}),
        ({"num_kv_heads": None, "head_dim": None}, {"num_kv_heads": 8, "head_dim": 8}),
        ({"num_kv_heads": 2, "head_dim": 16, "tie_embeddings": True}, {"num_kv_heads": 2, "head_dim": 16}),
        ({"hidden_size": 4096, "num_heads": 32}, {"ffn_hidden_size": 10944}),  # 8/3 * 4096 = 10922.7, up to 171 * 64
    ],
)
def test_model_defaults_are_concrete(given: dict[str, Any], expected: dict[str, Any]) -> None:
    model = ModelConfig(**MODEL | given)
    assert {name: getattr(model, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("optim", "decay_steps"), [({}, 50), ({"schedule": "wsd"}, 10), ({"schedule": "wsd", "decay_steps": 7}, 7)]
)
def test_optim_defaults_are_concrete(optim: dict[str, Any], decay_steps: int) -> None:
    for section in (optim, OptimConfig(**optim)):
        config = RunConfig.model_validate({"model": MODEL, "train": TRAIN, "optim": section})
        assert config.optim.decay_steps == decay_steps
        assert config.optim.min_lr == pytest.approx(0.1 * config.optim.lr)


def test_sections_can_be_made_in_python() -> None:
    config = RunConfig(
        model=ModelConfig(**MODEL), train=TrainConfig(**TRAIN), parallel=ParallelConfig(pp=2, stage_layers=(3, 1))
    )
    assert with_world(config, 8).dp == 4
    assert with_world(config, 8).num_microbatches == 2
    assert with_world(config, 8).world_size == 8


def test_what_depends_on_the_world_is_not_guessed() -> None:
    config = RunConfig(model=ModelConfig(**MODEL), train=TrainConfig(**TRAIN))
    with pytest.raises(AssertionError, match="with_world"):
        _ = config.num_microbatches


def test_frozen() -> None:
    config = RunConfig(model=ModelConfig(**MODEL), train=TrainConfig(**TRAIN))
    with pytest.raises(ValidationError, match="frozen"):
        config.train.seq_len = 1
    assert isinstance(config.data.train, tuple)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model", "num_layers", "4"),
        ("model", "num_layers", 4.0),
        ("model", "num_layers", True),
        ("model", "num_layers", 0),
        ("model", "family", "mamba"),
        ("model", "norm_eps", float("nan")),
        ("train", "seed", -1),
        ("train", "threads", 0),
        ("optim", "lr", float("inf")),
        ("optim", "beta2", 1.0),
        ("parallel", "zero_stage", 4),
        ("parallel", "num_microbatches", 4),
        ("run", "name", "../elsewhere"),
        ("run", "tensorboard", 1),
        ("data", "train", 5),
    ],
)
def test_strict(section: str, key: str, value: object) -> None:
    good: dict[str, Any] = {"model": MODEL, "train": TRAIN}
    RunConfig.model_validate(good)
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate(good | {section: good.get(section, {}) | {key: value}})
    wrong = [error for error in caught.value.errors() if error["type"] != "default_factory_not_called"]
    assert {error["loc"][:2] for error in wrong} == {(section, key)}


def test_an_optimizer_brings_its_usual_settings() -> None:
    adamw, lion, muon = (OptimConfig(name=name) for name in ("adamw", "lion", "muon"))
    assert (adamw.lr, adamw.min_lr, adamw.weight_decay, adamw.beta2, adamw.eps) == (3e-4, 0.1 * 3e-4, 0.1, 0.95, 1e-8)
    assert (lion.lr, lion.beta1, lion.beta2, lion.nesterov) == (1e-4, 0.9, 0.99, False)
    assert (muon.momentum, muon.nesterov, muon.lr) == (0.95, True, adamw.lr)
    adafactor = OptimConfig(name="adafactor", lr=0.01)
    assert adafactor.decay_rate(0.01) == 0.01, "PaLM's: the learning rate's square, of which one factor is here"
    assert OptimConfig(name="lion", beta2=0.5).beta2 == 0.5 and adamw.decay_rate(0.01) == 0.1
