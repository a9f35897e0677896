"""Rules of the optimizer."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.nearest import Rule, fixes
from megatron_lite.config.problems import Problem
from megatron_lite.config.values import Values


def nesterov_has_momentum(v: Values) -> Iterator[Problem]:
    name, momentum, key = v["optim.name"], v["optim.momentum"], "optim.nesterov"
    if name in ("sgd", "muon") and v[key] and not momentum:
        rule = "looks ahead along a momentum, and optim.momentum = 0"
        yield Problem(key, True, rule, "", fixes(key, [False]) + fixes("optim.momentum", [0.9]))


RULES: tuple[Rule, ...] = (nesterov_has_momentum,)
