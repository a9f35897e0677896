"""What becomes of each key: taken, kept, ignored or refused. The readers of the parts write into a `Translation`."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from megatron_lite.config.deepspeed.document import json_kind
from megatron_lite.config.keys import leaf_fields
from megatron_lite.config.problems import ABSENT, Fix, Problem, override
from megatron_lite.config.source import COMMAND_LINE
from megatron_lite.config.values import Unreadable, Values

AUTO = "auto"
"""What the Hugging Face Trainer fills in: here the run's own value stays."""


class Status(StrEnum):
    """What became of a key."""

    TAKEN = "taken"
    KEPT = "kept"
    IGNORED = "ignored"
    REFUSED = "refused"


@dataclass(frozen=True)
class Line:
    """One key of a DeepSpeed config.

    value: what the file gives, or `ABSENT` where DeepSpeed's default is what is meant.
    ours: the overrides that it became.
    note: what differs, or why it is not taken; empty where there is nothing to say.
    """

    status: Status
    key: str
    value: object
    ours: tuple[str, ...] = ()
    note: str = ""

    @property
    def given(self) -> str:
        """The value as JSON in one line, cut where it is long."""
        if self.value is ABSENT:
            return "(not given)"
        text = json.dumps(self.value, ensure_ascii=False)
        return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True)
class Ours:
    """A run without its DeepSpeed config.

    values: of the YAML and of the command line. origins: our key -> where it is written.
    """

    values: Values
    origins: Mapping[str, str]

    def on_command_line(self, key: str) -> bool:
        return self.origins.get(key) == COMMAND_LINE

    def in_file(self, key: str) -> bool:
        return key in self.origins and not self.on_command_line(key)

    def value(self, key: str) -> Any:
        """The value of one of our keys, or None where it has no valid one."""
        if key not in leaf_fields():
            return None
        try:
            return self.values[key]
        except Unreadable:
            return None

    def dp(self) -> tuple[int, str]:
        """The data-parallel size, and where it comes from. Where the processes are not known, a free dp is 1."""
        tp, pp, cp = (self.value(f"parallel.{axis}") or 1 for axis in ("tp", "pp", "cp"))
        given = self.value("parallel.dp")
        if given is not None:
            return given, f"parallel.dp = {given}"
        try:
            return self.values.dp, f"dp = {self.values.world} processes / (tp {tp} * pp {pp} * cp {cp})"
        except Unreadable:
            return 1, "dp = 1, for the number of processes is not known here"


@dataclass
class Translation:
    """The lines, and what they come to.

    values: our key -> value, what the command line gives left out. sources: our key -> the DeepSpeed key it is from.
    """

    ours: Ours
    name: str
    lines: list[Line] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def now(self, key: str) -> Any:
        """One of our keys as it stands: of the command line, else of DeepSpeed's file, else of the YAML."""
        if key in self.values:
            return self.values[key]
        return self.ours.value(key)

    def take(self, key: str, value: Any, ours: Mapping[str, Any], note: str = "", *, implied: bool = False) -> None:
        """The key sets keys of ours. implied: the file leaves it out, and so the YAML wins over DeepSpeed's default."""
        texts, notes, wins = [], [note] if note else [], {}
        for our_key, our_value in ours.items():
            there = self.ours.value(our_key)
            if self.ours.on_command_line(our_key):
                notes.append(f"the command line has {override(our_key, there)}")
            elif implied and self.ours.in_file(our_key):
                notes.append(f"{self.ours.origins[our_key]} has {override(our_key, there)}")
            else:
                wins[our_key] = our_value
                texts.append(override(our_key, our_value))
                if self.ours.in_file(our_key) and there != our_value:
                    notes.append(f"replaces {override(our_key, there)} of {self.ours.origins[our_key]}")
        self.values.update(wins)
        self.sources.update(dict.fromkeys(wins, key))
        lost = Status.KEPT if implied else Status.IGNORED
        status = Status.TAKEN if wins or not ours else lost
        self.lines.append(Line(status, key, value, tuple(texts), "; ".join(notes)))

    def keep(self, key: str, value: Any, note: str) -> None:
        self.lines.append(Line(Status.KEPT, key, value, (), note))

    def ignore(self, key: str, value: Any, why: str) -> None:
        self.lines.append(Line(Status.IGNORED, key, value, (), why))

    def refuse(
        self, key: str, value: Any, rule: str, remedy: str = "", fixes: Iterable[Fix] = (), *, unless: str = ""
    ) -> None:
        """The key cannot be followed, and the command ends. unless: our key that settles it on the command line."""
        if unless and self.ours.on_command_line(unless):
            there = override(unless, self.ours.value(unless))
            self.ignore(key, value, f"the command line has {there}, without which it is refused: it {rule}")
            return
        self.lines.append(Line(Status.REFUSED, key, value, (), rule))
        self.problems.append(Problem(key, value, rule, remedy, tuple(fixes), self.name))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


KINDS: Mapping[str, Callable[[Any], bool]] = {
    "true or false": lambda value: isinstance(value, bool),
    "an integer": lambda value: _is_number(value) and value == int(value),
    "a number": _is_number,
    "text": lambda value: isinstance(value, str),
    "an object": lambda value: isinstance(value, dict),
    "two numbers": lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)),
}
"""Kinds of values, as errors name them. An integer may be written as 5e8."""


class Fields:
    """One object of the file. What nobody has asked for is unknown at the end."""

    def __init__(self, translation: Translation, path: str, raw: Mapping[str, Any]) -> None:
        self.translation = translation
        self.path = path
        self._raw = raw
        self._asked: set[str] = set()

    def key(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def gives(self, name: str) -> bool:
        return self._raw.get(name) is not None

    def peek(self, name: str) -> Any:
        """What stands there, of whatever kind; it is not asked for by this."""
        return self._raw.get(name)

    def get(self, name: str, kind: str) -> Any:
        """A value of a kind, `AUTO`, or `ABSENT`; null is absent. Any other value is refused, and then absent."""
        first = name not in self._asked
        self._asked.add(name)
        value = self._raw.get(name)
        if value is None:
            return ABSENT
        if value == AUTO:
            return AUTO
        if not KINDS[kind](value):
            if first:
                self.translation.refuse(self.key(name), value, f"must be {kind}, and is {json_kind(value)}")
            return ABSENT
        return int(value) if kind == "an integer" else value

    def inside(self, name: str) -> Fields | None:
        """The object under a name, or None where there is none."""
        value = self.get(name, "an object")
        if value == AUTO:
            self.translation.keep(self.key(name), value, "auto: the run's own")
        return Fields(self.translation, self.key(name), value) if isinstance(value, dict) else None

    def move(
        self,
        name: str,
        kind: str,
        ours: str,
        *,
        convert: Callable[[Any], Any] = lambda value: value,
        note: str = "",
        default: Any = ABSENT,
        yields: bool = True,
    ) -> None:
        """A key that is one of ours by another name. default: DeepSpeed's, where leaving it out means that; yields:
        whether the YAML wins over it."""
        value = self.get(name, kind)
        if value is ABSENT:
            if default is not ABSENT and not self.gives(name):
                words = f"DeepSpeed's default is {json.dumps(default)}; {note}".removesuffix("; ")
                self.translation.take(self.key(name), ABSENT, {ours: convert(default)}, words, implied=yields)
        elif value == AUTO:
            self.keep_ours(name, ours)
        else:
            self.translation.take(self.key(name), value, {ours: convert(value)}, note)

    def keep_ours(self, name: str, *ours: str) -> None:
        """The line of "auto"."""
        have = ", ".join(override(key, self.translation.now(key)) for key in ours)
        self.translation.keep(self.key(name), AUTO, f"auto: {have} stays")

    def drop(self, name: str, kind: str, why: str) -> None:
        """A key that has no effect here."""
        value = self.get(name, kind)
        if value is not ABSENT:
            self.translation.ignore(self.key(name), value, why)

    def same(self, name: str, kind: str) -> None:
        """A key that asks for what is so here in any case."""
        value = self.get(name, kind)
        if value == AUTO:
            self.translation.keep(self.key(name), value, "auto: there is no choice here")
        elif value is not ABSENT:
            self.translation.take(self.key(name), value, {}, "as it is here")

    def all_ignored(self, why: str) -> None:
        """A line for each key, all for one reason."""
        for name, value in self._raw.items():
            self.translation.ignore(self.key(name), value, why)

    def rest(self, reasons: Mapping[str, str], *, strict: bool) -> None:
        """Lines for what nobody has asked for: ignored for a reason, or unknown.

        strict: whether DeepSpeed itself refuses unknown keys here.
        """
        told = {line.key for line in self.translation.lines}
        for name, value in self._raw.items():
            key = self.key(name)
            if value is None and key not in told:
                self.translation.ignore(key, value, "null, as if it were left out")
            elif value is None or name in self._asked:
                continue
            elif name in reasons:
                self.translation.ignore(key, value, reasons[name])
            else:
                near = difflib.get_close_matches(name, {*reasons, *self._asked}, n=1, cutoff=0.6)
                remedy = f"did you mean {self.key(near[0])}?" if near else ""
                if strict:
                    rule = "is not a key of DeepSpeed, which refuses it too"
                    self.translation.refuse(key, value, rule, remedy or "leave it out")
                else:
                    words = "warning: not a key of DeepSpeed, which ignores it too"
                    self.translation.ignore(key, value, "; ".join(filter(None, (words, remedy))))
