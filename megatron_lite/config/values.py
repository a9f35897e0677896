"""The values of a config by dotted key, some of which may be missing because they are invalid.

Rules read a config through `Values`. A rule that reads a key whose value is itself invalid stops there: what it
would say rests on a number that is going to change. So one pass finds all independent problems.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from megatron_lite.config.keys import leaf_fields, section_names, validate_value
from megatron_lite.config.schema import RunConfig, default_decay_steps

_DECAY_STEPS = "optim.decay_steps"


class Unreadable(Exception):
    """A rule read a key that has no valid value; `megatron_lite.config.rules.check` drops the rule."""


class Values:
    """Read-only values by dotted key.

    given: the keys that the user wrote, as opposed to defaults.
    world: number of processes, or None if it is not known yet.
    """

    def __init__(self, values: Mapping[str, Any], *, given: Collection[str], world: int | None) -> None:
        self._values = dict(values)
        self._given = frozenset(given)
        self._world = world

    def __getitem__(self, key: str) -> Any:
        assert key in leaf_fields(), f"{key} is not in the schema"
        if key not in self._values:
            raise Unreadable(key)
        return self._values[key]

    def given(self, key: str) -> bool:
        """Whether the user wrote the key."""
        return key in self._given

    @property
    def world(self) -> int:
        """Number of processes."""
        if self._world is None:
            raise Unreadable("world size")
        return self._world

    @property
    def dp(self) -> int:
        """Data-parallel size, given or world / (tp * pp * cp)."""
        if self["parallel.dp"] is not None:
            return int(self["parallel.dp"])
        rest = self["parallel.tp"] * self["parallel.pp"] * self["parallel.cp"]
        if self.world % rest:
            raise Unreadable("parallel.dp")
        return self.world // rest


def values_of(config: RunConfig, *, world: int | None) -> Values:
    """The values of a config that pydantic has accepted."""
    values, given = {}, set()
    for section_name in section_names():
        section = getattr(config, section_name)
        for name in type(section).model_fields:
            values[f"{section_name}.{name}"] = getattr(section, name)
        given |= {f"{section_name}.{name}" for name in section.model_fields_set}
    return Values(values, given=given, world=world)


def partial_values(tree: Mapping[str, Any], invalid: Collection[str], *, world: int | None) -> Values:
    """The values of a raw config, without those keys that are in ``invalid``, below one, or above one.

    Defaults are filled in where everything that they follow from is valid.
    """
    values: dict[str, Any] = {}
    given: set[str] = set()
    for section_name, field in RunConfig.model_fields.items():
        if section_name in invalid:
            continue
        raw = tree.get(section_name) or {}
        section: Any = field.annotation
        known: dict[str, Any] = {}
        for name, leaf in section.model_fields.items():
            key = f"{section_name}.{name}"
            if any(bad == key or bad.startswith((f"{key}.", f"{key}[")) for bad in invalid):
                continue
            if name in raw and not (raw[name] is None and leaf.default_factory is not None):
                known[name] = validate_value(leaf, raw[name])
                given.add(key)
            elif not leaf.is_required():
                default = leaf.get_default(call_default_factory=True, validated_data=known)
                if default is None and leaf.default_factory is not None:
                    continue  # it follows from a key that is invalid
                known[name] = default
        values |= {f"{section_name}.{name}": value for name, value in known.items()}
    if values.get(_DECAY_STEPS, 0) is None and {"optim.schedule", "train.num_steps"} <= values.keys():
        values[_DECAY_STEPS] = default_decay_steps(values["optim.schedule"], values["train.num_steps"])
    return Values(values, given=given, world=world)
