"""The config of a run as rows: each key with its value, what it means, and whether it was left at its default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from megatron_lite.config import RunConfig, key_help
from megatron_lite.config.keys import leaf_fields
from megatron_lite.config.yaml_text import flow

# Their defaults follow from what is not in a config: the name of its file, the number of processes.
DEFAULT_UNKNOWN = frozenset({"run.name", "parallel.dp"})


@dataclass(frozen=True)
class Setting:
    """value: as it is written in YAML. default: in words. is_changed: the value is not what leaving the key out gives;
    False for a key that has to be given."""

    key: str
    value: str
    type: str
    default: str
    description: str
    is_changed: bool


def settings_of(config: RunConfig) -> list[Setting]:
    """Every key of the config in the order of the schema; keys inside a key that is null are left out."""
    tree = config.model_dump()
    rows = []
    for entry in key_help():
        value = _lookup(tree, entry.key)
        if value is _ABSENT or isinstance(value, Mapping):
            continue
        text = value if isinstance(value, str) else flow(value)
        rows.append(
            Setting(entry.key, text, entry.type, entry.default, entry.description, _is_changed(tree, entry.key))
        )
    return rows


_ABSENT = object()


def _lookup(tree: Mapping[str, Any], key: str) -> Any:
    value: Any = tree
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _ABSENT
        value = value[part]
    return value


def _is_changed(tree: Mapping[str, Any], key: str) -> bool:
    if key in DEFAULT_UNKNOWN or leaf_fields()[key].is_required():
        return False
    try:
        config = RunConfig.model_validate(_without(tree, key.split(".")))
    except ValidationError:  # the other keys allow no config without this one
        return True
    return bool(_lookup(config.model_dump(), key) != _lookup(tree, key))


def _without(tree: Mapping[str, Any], parts: list[str]) -> dict[str, Any]:
    first, *rest = parts
    if not rest:
        return {name: value for name, value in tree.items() if name != first}
    return {name: _without(value, rest) if name == first else value for name, value in tree.items()}
