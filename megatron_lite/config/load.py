"""From a YAML file and overrides to a `RunConfig`, with everything that is wrong in one `ConfigError`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_lite.config import files, rules
from megatron_lite.config.keys import (
    describe,
    leaf_fields,
    nearest_value,
    suggestion,
    with_article,
)
from megatron_lite.config.problems import ABSENT, ConfigError, Problem, override
from megatron_lite.config.schema import RunConfig
from megatron_lite.config.source import Source, read_source
from megatron_lite.config.values import Values, partial_values, values_of
from megatron_lite.config.yaml_text import dump

DERIVED = {
    "num_microbatches": "is derived, train.global_batch_size / (train.micro_batch_size * dp), and not a key",
    "world_size": "is derived, the number of processes that are started (--nproc, torchrun), and not a key",
}
"""Quantities that users look for among the keys, with what they follow from."""


def load_config(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    world_size: int | None = None,
    files_exist: bool = False,
) -> RunConfig:
    """Reads and validates a config.

    path: YAML file; its ``model`` may be the path of a model file, relative to the folder of ``path``. None: all
        keys come from the overrides.
    overrides: ``key=value`` with YAML values, later ones win; a path in ``model=path`` is relative to the working
        directory.
    world_size: number of processes. When given, the layout is checked against it and ``parallel.dp`` is filled in.
    files_exist: whether the data files, the tokenizer and the checkpoint that the config names have to be there.

    Raises `ConfigError` with all problems: broken YAML, unknown keys, values of the wrong type or out of range, and
    broken rules across keys. Rules that rest on an invalid value are not judged.
    """
    source = read_source(path, overrides)
    config, problems, invalid = _validate(source)
    values = values_of(config, world=world_size) if config else partial_values(source.tree, invalid, world=world_size)
    found = [*source.problems, *problems, *_judge(values, files_exist=files_exist)]
    if found:
        raise ConfigError([source.locate(problem) for problem in found], source.name)
    assert config is not None
    return config if world_size is None else _with_dp(config, values)


def given_values(
    path: str | Path | None, overrides: Sequence[str], *, world_size: int | None = None
) -> tuple[Values, Mapping[str, str]]:
    """The values of a config as far as they are valid, and where each was written (key -> ``file:line``, or the command
    line). Raises `ConfigError` where the file cannot be read at all."""
    source = read_source(path, overrides)
    config, _, invalid = _validate(source)
    values = values_of(config, world=world_size) if config else partial_values(source.tree, invalid, world=world_size)
    return values, source.origins


def with_world(config: RunConfig, world_size: int) -> RunConfig:
    """The config with ``parallel.dp`` filled in: world_size / (tp * pp * cp). Raises `ConfigError` if it cannot be."""
    values = values_of(config, world=world_size)
    problems = _judge(values, files_exist=False)
    if problems:
        raise ConfigError(problems, f"{config.run.name} with {world_size} processes")
    return _with_dp(config, values)


def to_yaml(config: RunConfig) -> str:
    """The whole config, defaults included, as YAML that `load_config` reads back to an equal config."""
    return dump(config.model_dump())


def _judge(values: Values, *, files_exist: bool) -> list[Problem]:
    return rules.check(values) + (files.check_values(values) if files_exist else [])


def _with_dp(config: RunConfig, values: Values) -> RunConfig:
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"dp": values.dp})})


def _validate(source: Source) -> tuple[RunConfig | None, list[Problem], set[str]]:
    """The config, or the problems with single keys and the keys that they make unreadable."""
    try:
        config = RunConfig.model_validate(source.tree)
        return (None if source.unreadable else config), [], set(source.unreadable)
    except ValidationError as error:
        problems, invalid = [], set(source.unreadable)
        for item in error.errors(include_url=False):
            if item["type"] == "default_factory_not_called":
                continue  # a default that follows from an invalid key, which has its own error
            key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in item["loc"])[1:]
            if item["type"] == "missing" and key.partition(".")[0] in source.unreadable:
                continue  # the file that cannot be read may hold it
            invalid.add(key)
            if item["type"] == "extra_forbidden":
                problems.append(_unknown_key(key, item["input"]))
            elif item["type"] == "missing" and not key.endswith("]"):  # an entry of a list is a matter of the list
                problems.extend(_missing_key(key, invalid))
            else:
                problems.append(_bad_value(key, source.tree))
        return None, _without_repeats(problems), invalid


def _unknown_key(key: str, value: Any) -> Problem:
    derived = DERIVED.get(key.rpartition(".")[2])
    if derived is not None:
        return Problem(key, value, derived, "leave it out")
    return Problem(key, value, "is not a key", suggestion(key))


def _missing_key(key: str, invalid: set[str]) -> list[Problem]:
    field = leaf_fields().get(key)
    if field is not None:
        return [Problem(key, ABSENT, "is required", f"give {with_article(describe(field))}: {field.description}")]
    section: Any = RunConfig.model_fields[key].annotation
    required = [f"{key}.{name}" for name, inner in section.model_fields.items() if inner.is_required()]
    invalid.update(required)
    invalid.discard(key)  # its other keys have their defaults
    if key == "model":
        remedy = "give model=PATH of a model file, or the keys " + ", ".join(required)
        return [Problem(key, ABSENT, "is required", remedy)]
    return [problem for name in required for problem in _missing_key(name, invalid)]


def _bad_value(key: str, tree: Mapping[str, Any]) -> Problem:
    """A value that its field does not take; an entry of a list is reported as the list."""
    key = key.partition("[")[0]
    value: Any = tree
    siblings: Any = {}
    for part in key.split("."):
        value, siblings = value[part], value
    field = leaf_fields().get(key)
    if field is None:
        section: Any = RunConfig.model_fields[key].annotation
        return Problem(key, value, "must be a mapping with the keys " + ", ".join(section.model_fields))
    fixes = tuple((override(key, legal),) for legal in nearest_value(field, value, siblings))
    remedy = "" if fixes else field.description or ""
    return Problem(key, value, f"must be {with_article(describe(field))}", remedy, fixes)


def _without_repeats(problems: list[Problem]) -> list[Problem]:
    """Two bad entries of one list are one problem of that list."""
    return [problem for position, problem in enumerate(problems) if problem not in problems[:position]]
