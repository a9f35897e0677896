"""Rules of the arithmetic: what goes with which train.precision."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.loss_scale import LossScaleConfig
from megatron_lite.config.nearest import Rule, fixes
from megatron_lite.config.problems import Problem
from megatron_lite.config.values import Values


def loss_scale_is_for_fp16(v: Values) -> Iterator[Problem]:
    precision = v["train.precision"]
    if precision == "fp16":
        return
    for name, field in LossScaleConfig.model_fields.items():
        key = f"loss_scale.{name}"
        if v[key] != field.default:
            rule = f"has no effect with train.precision = {precision}: only the loss of fp16 is scaled"
            yield Problem(key, v[key], rule, "", fixes("train.precision", ["fp16"]) + fixes(key, [field.default]))


def smallest_scale_is_below_the_first(v: Values) -> Iterator[Problem]:
    minimum, initial, key = v["loss_scale.minimum"], v["loss_scale.initial"], "loss_scale.minimum"
    if minimum > initial:
        rule = f"must be at most loss_scale.initial = {initial}"
        yield Problem(key, minimum, rule, "", fixes(key, [initial]) + fixes("loss_scale.initial", [minimum]))


def stochastic_rounding_is_for_bf16(v: Values) -> Iterator[Problem]:
    precision, key = v["train.precision"], "train.stochastic_rounding"
    if v[key] and precision != "bf16":
        rule = f"rounds weights to bf16, and train.precision = {precision}"
        yield Problem(key, True, rule, "", fixes("train.precision", ["bf16"]) + fixes(key, [False]))


def fp16_needs_one_decision(v: Values) -> Iterator[Problem]:
    key = "train.precision"
    if v[key] == "fp16" and v["parallel.weight_stashing"]:
        rule = (
            "cannot be with parallel.weight_stashing: all ranks skip a step together where its gradient overflows, "
            "and there each stage changes its weights alone"
        )
        yield Problem(key, "fp16", rule, "", fixes(key, ["bf16"]) + fixes("parallel.weight_stashing", [False]))


RULES: tuple[Rule, ...] = (
    loss_scale_is_for_fp16,
    smallest_scale_is_below_the_first,
    stochastic_rounding_is_for_bf16,
    fp16_needs_one_decision,
)
