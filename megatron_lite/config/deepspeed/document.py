"""The JSON text of a DeepSpeed config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_lite.config.files import near_files
from megatron_lite.config.problems import ABSENT, ConfigError, Problem


class _Duplicate(ValueError):
    """A key that one object holds twice, which DeepSpeed refuses as well."""


def read_document(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `ConfigError` where there is none: no file, no JSON, another value."""
    problem = _problem_of(path)
    if isinstance(problem, Problem):
        raise ConfigError([problem], str(path))
    return problem


def _problem_of(path: Path) -> dict[str, Any] | Problem:
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_object)
    except FileNotFoundError:
        near = near_files(path, "*.json")
        remedy = "did you mean " + " or ".join(map(str, near)) + "?" if near else "give the path of a DeepSpeed config"
        return Problem("--deepspeed", str(path), "there is no such file", remedy)
    except IsADirectoryError:
        return Problem("--deepspeed", str(path), "is a folder", "give the path of a JSON file")
    except json.JSONDecodeError as error:
        remedy = "JSON has no comments and no comma after the last entry (DeepSpeed reads Hjson, which has)"
        return Problem("", ABSENT, f"is not JSON: {error.msg}", remedy, origin=f"{path}:{error.lineno}:{error.colno}")
    except _Duplicate as error:
        return Problem(str(error), ABSENT, "is given twice in one object", "keep one of the two", origin=str(path))
    except (OSError, ValueError, RecursionError) as error:
        return Problem("--deepspeed", str(path), f"cannot be read: {error}")
    if not isinstance(document, dict):
        rule = f"holds {json_kind(document)}, and must be an object of keys"
        return Problem("", ABSENT, rule, 'it starts as {"zero_optimization": ...', origin=str(path))
    return document


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Duplicate(next(name for name in names if names.count(name) > 1))
    return found


def json_kind(value: Any) -> str:
    """What a JSON value is, in words."""
    kinds = ((bool, "true or false"), (int, "a number"), (float, "a number"), (str, "text"), (list, "a list"))
    return next((words for kind, words in kinds if isinstance(value, kind)), "null" if value is None else "an object")
