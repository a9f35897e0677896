"""Rules of the checkpoint section."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.nearest import Rule, fixes, multiples_around
from megatron_lite.config.problems import Problem
from megatron_lite.config.values import Values


def kept_checkpoints_are_written(v: Values) -> Iterator[Problem]:
    every, interval, key = v["checkpoint.keep_every"], v["checkpoint.interval"], "checkpoint.keep_every"
    if every is None:
        return
    if interval == 0:
        rule = "asks for checkpoints on the way to stay, but with checkpoint.interval = 0 there are none"
        yield Problem(key, every, rule, "", fixes("checkpoint.interval", [every]) + fixes(key, [None]))
    elif every % interval:
        rule = f"must be divisible by checkpoint.interval = {interval}"
        yield Problem(key, every, rule, "", fixes(key, multiples_around(every, interval)))


RULES: tuple[Rule, ...] = (kept_checkpoints_are_written,)
