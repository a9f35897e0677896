"""What is said of loss scales, stochastic rounding and gradient dtypes that go with no precision or another one."""

from __future__ import annotations

import pytest

from megatron_lite.config import ConfigError, Problem, RunConfig, load_config
from megatron_lite.config.loss_scale import LossScaleConfig

KEYS = (
    "model.family=llama", "model.vocab_size=97", "model.hidden_size=64", "model.num_layers=6", "model.num_heads=8",
    "model.max_seq_len=64", "train.seq_len=32", "train.global_batch_size=8", "train.num_steps=50",
)  # fmt: skip


def problems(*keys: str) -> list[Problem]:
    try:
        load_config(None, [*KEYS, *keys])
    except ConfigError as error:
        return list(error.problems)
    return []


# overrides, the key that is refused, the fixes in order
REFUSED: list[tuple[str, str, list[str]]] = [
    ("loss_scale.initial=4", "loss_scale.initial", ["train.precision=fp16", "loss_scale.initial=65536.0"]),
    (
        "train.precision=bf16 loss_scale.max_skips=4",
        "loss_scale.max_skips",
        ["train.precision=fp16", "loss_scale.max_skips=50"],
    ),
    (
        "train.precision=fp16 loss_scale.initial=4 loss_scale.minimum=8",
        "loss_scale.minimum",
        ["loss_scale.minimum=4.0", "loss_scale.initial=8.0"],
    ),
    (
        "train.precision=fp16 train.stochastic_rounding=true",
        "train.stochastic_rounding",
        ["train.precision=bf16", "train.stochastic_rounding=false"],
    ),
    (
        "train.stochastic_rounding=true",
        "train.stochastic_rounding",
        ["train.precision=bf16", "train.stochastic_rounding=false"],
    ),
    (
        "train.precision=fp16 parallel.weight_stashing=true parallel.pp=2 optim.clip_grad_norm=0",
        "train.precision",
        ["train.precision=bf16", "parallel.weight_stashing=false"],
    ),
]


@pytest.mark.parametrize(("given", "key", "fixes"), REFUSED)
def test_what_does_not_go_together_is_refused_with_what_does(given: str, key: str, fixes: list[str]) -> None:
    overrides = given.split(" ")
    (problem,) = problems(*overrides)
    assert problem.key == key and problem.rule
    assert [" ".join(fix) for fix in problem.fixes] == fixes
    for fix in problem.fixes:
        assert problems(*overrides, *fix) == [], "what is offered is legal"


ALLOWED = (
    ("train.precision=fp16", "loss_scale.initial=4", "loss_scale.minimum=4"),
    ("train.precision=bf16", "train.stochastic_rounding=true", "train.grad_dtype=param"),
    ("train.precision=fp32", "train.grad_dtype=param"),  # the same dtype: no effect
    ("train.precision=fp32", "loss_scale.initial=65536.0"),  # a default
)


@pytest.mark.parametrize("keys", ALLOWED)
def test_what_goes_together_is_taken(keys: tuple[str, ...]) -> None:
    assert problems(*keys) == []


def test_bounds_of_the_scale() -> None:
    for key in ("loss_scale.initial=1e31", "loss_scale.initial=0", "loss_scale.minimum=0", "loss_scale.backoff=1"):
        (problem,) = problems("train.precision=fp16", key)
        assert problem.key == key.partition("=")[0]


def test_the_default_is_the_issue_s() -> None:
    assert LossScaleConfig().initial == 2**16
    assert isinstance(load_config(None, [*KEYS, "train.precision=fp16"]), RunConfig)
