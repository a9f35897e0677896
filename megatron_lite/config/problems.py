"""What is wrong with a config, and the one error that says all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from megatron_lite.config.yaml_text import flow


class _Absent:
    """The value of a key that is not there; null is a value."""

    def __repr__(self) -> str:
        return "(not given)"


ABSENT: Final = _Absent()

Fix = tuple[str, ...]
"""Overrides (``key=value``) that together remove a problem."""


@dataclass(frozen=True)
class Problem:
    """One broken rule.

    key: the dotted key, as on the command line.
    value: what was given, or `ABSENT`.
    rule: what the key has to satisfy, with the values of the other keys it depends on.
    remedy: what to do, in words; empty where `fixes` says it all.
    fixes: alternatives, nearest first. Each is the overrides that make this problem go away.
    origin: where the value was given, such as ``configs/runs/x.yaml:12``; empty if it is a default.
    """

    key: str
    value: object
    rule: str
    remedy: str = ""
    fixes: tuple[Fix, ...] = ()
    origin: str = ""

    @property
    def advice(self) -> str:
        """The remedy in one line: the fixes, then the words."""
        fixes = " or ".join(" ".join(fix) for fix in self.fixes)
        return "; ".join(part for part in (f"use {fixes}" if fixes else "", self.remedy) if part)

    def __str__(self) -> str:
        what = self.key if self.value is ABSENT else f"{self.key} = {flow(self.value)}"
        head = "   ".join(part for part in (what, f"[{self.origin}]" if self.origin else "") if part)
        return "\n    ".join([head, self.rule] + [f"-> {self.advice}"] * bool(self.advice))


def override(key: str, value: Any) -> str:
    """``key=value`` as the command line takes it."""
    return f"{key}={flow(value)}"


class ConfigError(ValueError):
    """Everything that is wrong with one config. ``problems`` holds it as data, ``str`` as a readable list."""

    def __init__(self, problems: Sequence[Problem], source: str = "") -> None:
        assert problems, "an error needs a problem"
        self.problems = tuple(problems)
        self.source = source
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        head = f"{count} in {source}:" if source else f"{count} in the config:"
        body = (f"  {number}. " + str(problem).replace("\n", "\n  ") for number, problem in enumerate(self.problems, 1))
        super().__init__("\n".join([head, *body]))
