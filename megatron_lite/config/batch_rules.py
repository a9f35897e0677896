"""Rules of a global batch that grows: each size on the way is one that a step can have."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_lite.config.nearest import MAX_FIXES, Rule, divisors, fixes, multiples_around
from megatron_lite.config.problems import Problem
from megatron_lite.config.values import Unreadable, Values

_KEY = "train.batch_rampup"


def rampup_is_whole_microbatches(v: Values) -> Iterator[Problem]:
    batch, micro, given = v["train.global_batch_size"], v["train.micro_batch_size"], v[_KEY]
    try:
        unit, product = micro * v.dp, f"train.micro_batch_size * dp = {micro} * {v.dp} = {micro * v.dp}"
    except Unreadable:
        unit, product = micro, f"train.micro_batch_size = {micro}"
    if given is None or batch % unit:
        return
    start, increment, samples = given
    broken = []
    if start >= batch:
        broken.append(f"must start below train.global_batch_size = {batch}")
    elif (batch - start) % increment:
        broken.append(
            f"must reach train.global_batch_size = {batch} in whole increments, {batch - start} is to be added"
        )
    if start % unit or increment % unit:
        broken.append(f"must have a start and an increment divisible by {product}")
    if broken:
        pairs = _ramps_near(start, increment, batch, unit)
        legal: list[object] = [[*pair, samples] for pair in pairs] or [None]
        yield Problem(_KEY, list(given), "; ".join(broken), "", fixes(_KEY, legal))


def _ramps_near(start: int, increment: int, batch: int, unit: int) -> list[tuple[int, int]]:
    """The legal (start, increment) nearest to those given, by the factors that they change; none if no batch is less.

    A start is legal if it is a multiple of ``unit`` below the batch, an increment if the rest is a multiple of it.
    """
    starts = {start, *multiples_around(start, unit), batch - unit}
    if increment % unit == 0:  # those from which the batch is reached as the increment stands
        below = start - (start - batch) % increment
        starts |= {below, below + increment, batch - increment}
    legal = [one for one in starts if 0 < one < batch and one % unit == 0]
    pairs = [(one, unit * part) for one in legal for part in divisors((batch - one) // unit)]

    def distance(pair: tuple[int, int]) -> tuple[float, int, int]:
        return abs(math.log(pair[0] / start)) + abs(math.log(pair[1] / increment)), *pair

    return sorted(pairs, key=distance)[:MAX_FIXES]


def rampup_has_schedules(v: Values) -> Iterator[Problem]:
    if v[_KEY] is not None and v["parallel.schedule"].endswith(".csv"):
        rule = f"changes the number of microbatches, and parallel.schedule = {v['parallel.schedule']} is for one number"
        yield Problem(_KEY, list(v[_KEY]), rule, "or use a schedule by name", fixes(_KEY, [None]))


RULES: tuple[Rule, ...] = (rampup_is_whole_microbatches, rampup_has_schedules)
