"""Rules that span several keys, as pure functions of their values.

A rule yields a `Problem` with the nearest legal values, computed and not guessed: each fix, given as overrides,
removes the problem. `check` runs them all. Files are looked for in `megatron_lite.config.files`.
"""

from __future__ import annotations

from megatron_lite.config import (
    batch_rules,
    checkpoint_rules,
    data_rules,
    layout_rules,
    model_rules,
    offload_rules,
    optim_rules,
    pipeline_rules,
    precision_rules,
    step_rules,
)
from megatron_lite.config.nearest import Rule
from megatron_lite.config.problems import Problem
from megatron_lite.config.values import Unreadable, Values

RULES: tuple[Rule, ...] = (
    *model_rules.RULES,
    *layout_rules.RULES,
    *pipeline_rules.RULES,
    *offload_rules.RULES,
    *step_rules.RULES,
    *optim_rules.RULES,
    *precision_rules.RULES,
    *batch_rules.RULES,
    *data_rules.RULES,
    *checkpoint_rules.RULES,
)


def check(values: Values) -> list[Problem]:
    """All broken rules, in the order of the schema; a rule that reads an invalid key is left out."""
    problems: list[Problem] = []
    for rule in RULES:
        try:
            problems.extend(rule(values))
        except Unreadable:
            continue
    return problems
