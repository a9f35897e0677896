"""What every rule needs: the nearest legal values, and how a fix is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

from megatron_lite.config.problems import Fix, Problem, override
from megatron_lite.config.values import Unreadable, Values

Rule = Callable[[Values], Iterator[Problem]]

MAX_FIXES = 2
"""Alternatives that one message offers: the nearest below and above, or the two nearest layouts."""


def around(value: int, legal: Iterable[int]) -> list[int]:
    """The nearest legal number below and the nearest above ``value``, the nearer one first."""
    numbers = set(legal)
    below = [number for number in numbers if number < value]
    above = [number for number in numbers if number > value]
    pair = sorted(below)[-1:] + sorted(above)[:1]
    return sorted(pair, key=lambda number: abs(number - value))


def multiples_around(value: int, unit: int, *, most: int | None = None) -> list[int]:
    """The nearest positive multiples of ``unit`` below and above ``value``, none greater than ``most``."""
    down = value // unit * unit
    return around(value, (n for n in (down, down + unit) if n > 0 and (most is None or n <= most)))


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def fixes(key: str, legal: Iterable[object]) -> tuple[Fix, ...]:
    """One fix for each legal value of a key."""
    return tuple((override(key, value),) for value in legal)


def readable(v: Values, key: str) -> int | None:
    """The value of a key, or None where it has no valid one."""
    try:
        return int(v[key])
    except Unreadable:
        return None


def divides_either_way(kv_heads: int, tp: int) -> bool:
    """Each tp rank holds whole kv heads, or each kv head is held by whole ranks."""
    return kv_heads % tp == 0 or tp % kv_heads == 0
