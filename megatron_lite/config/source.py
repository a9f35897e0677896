"""What the user wrote, from files and overrides, before anything is judged: a tree, and where each key came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_lite.config.files import near_files
from megatron_lite.config.keys import leaf_fields, section_names, suggestion, takes_text_only
from megatron_lite.config.problems import ABSENT, ConfigError, Problem
from megatron_lite.config.yaml_text import Document, parse

COMMAND_LINE = "command line"


class Override(str):
    """``key=value`` from a file beside the config. place: the key there that it is from."""

    file: str
    origin: str

    def __new__(cls, text: str, file: str, place: str) -> Override:
        found = super().__new__(cls, text)
        found.file, found.origin = file, f"{file}: {place}"
        return found


@dataclass
class Source:
    """A raw config on its way to validation.

    tree: section -> key -> value, as plain dicts.
    origins: dotted key -> ``file:line`` or ``command line``.
    problems: what was wrong with the text itself.
    unreadable: sections whose file could not be read, so that what the user gave there is not known.
    name: what an error calls the whole.
    """

    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unreadable: set[str] = field(default_factory=set)
    name: str = ""

    def locate(self, problem: Problem) -> Problem:
        """The problem with the place where its key, or what is in it, was written."""
        if problem.origin:
            return problem
        key = problem.key.partition("[")[0]
        below = (origin for other, origin in self.origins.items() if other.startswith(f"{key}."))
        return replace(problem, origin=self.origins.get(key) or next(below, ""))


def read_source(path: str | Path | None, overrides: Sequence[str]) -> Source:
    """Reads the file, puts the model file in its place, and applies the overrides.

    Raises `ConfigError` where nothing more can be said: the file is missing, unreadable or not YAML. A model file that
    is so is one problem among others.
    """
    files = dict.fromkeys(text.file for text in overrides if isinstance(text, Override))
    source = Source(name=" with ".join([str(path) if path is not None else COMMAND_LINE, *files]))
    if path is not None:
        _read_run_file(source, Path(path))
    pairs = [pair for text in overrides if (pair := _split_override(source, text)) is not None]
    # model=PATH replaces the whole section, so it goes first and model.key=value changes what it brought
    for key, value, origin in sorted(pairs, key=lambda pair: pair[0] != "model"):
        _apply_override(source, key, value, origin)
    return source


def _read_run_file(source: Source, path: Path) -> None:
    document = _read_yaml(path)
    if isinstance(document, Problem):
        raise ConfigError([document], str(path))
    source.problems += _duplicates(document, path, "")
    if document.value is None:
        return
    if not isinstance(document.value, dict):
        raise ConfigError([_not_a_mapping(path, document.value)], str(path))
    for name, value in document.value.items():
        # an empty section has only defaults
        source.tree[str(name)] = {} if value is None and name in section_names() else _text_keys(value)
    source.origins.update({key: f"{path}:{line}" for key, line in document.lines.items()})
    model = source.tree.get("model")
    if isinstance(model, str):
        _read_model_file(source, path.parent / model, origin=source.origins.get("model", str(path)))
    run = source.tree.setdefault("run", {})
    if isinstance(run, dict) and "name" not in run:
        name = path.stem
        if name[:1].isalnum() and all(char.isascii() and (char.isalnum() or char in "._-") for char in name):
            run["name"] = name


def _read_model_file(source: Source, path: Path, origin: str) -> None:
    document = _read_yaml(path, key="model", origin=origin)
    if not isinstance(document, Problem) and not isinstance(document.value, dict):
        document = _not_a_mapping(path, document.value)
    if isinstance(document, Problem):
        source.problems.append(document)
        source.unreadable.add("model")
        source.tree["model"] = {}
        return
    source.problems += _duplicates(document, path, "model.")
    source.unreadable.discard("model")
    source.tree["model"] = _text_keys(document.value)
    source.origins.update({f"model.{key}": f"{path}:{line}" for key, line in document.lines.items()})


def _read_yaml(path: Path, *, key: str = "", origin: str = "") -> Document | Problem:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = near_files(path, "*.y*ml") or near_files(path.with_suffix(".yaml"), "*.y*ml")
        remedy = "did you mean " + " or ".join(map(str, near)) + "?" if near else _what_is_there(path.parent)
        return Problem(key or "config file", str(path), "there is no such file", remedy, origin=origin)
    except IsADirectoryError:
        return Problem(key or "config file", str(path), "is a folder", _what_is_there(path), origin=origin)
    except (OSError, UnicodeDecodeError) as error:
        return Problem(key or "config file", str(path), f"cannot be read: {error}", origin=origin)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        said = ", ".join(part for part in (error.context, error.problem) if part)
        remedy = "a tab cannot indent YAML; use spaces" if "\\t" in said else "check the indentation and quotes there"
        return Problem("", ABSENT, f"is not YAML: {said}", remedy, origin=place)
    except yaml.YAMLError as error:
        return Problem("", ABSENT, f"is not YAML: {error}", origin=str(path))


def _what_is_there(folder: Path) -> str:
    if not folder.is_dir():
        return f"the folder {folder} does not exist either"
    names = sorted(found.name for found in folder.glob("*.y*ml"))
    return f"{folder} has {', '.join(names)}" if names else f"{folder} has no YAML files"


def _not_a_mapping(path: Path, value: Any) -> Problem:
    what = "is empty" if value is None else f"holds one {type(value).__name__}"
    return Problem("", ABSENT, f"{what}, and must be a mapping of keys", origin=str(path))


def _text_keys(value: Any) -> Any:
    """YAML allows keys that are numbers; the schema (and pydantic) knows names."""
    return {str(key): _text_keys(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _duplicates(document: Document, path: Path, prefix: str) -> list[Problem]:
    return [
        Problem(
            prefix + duplicate.key,
            ABSENT,
            f"is given twice, on lines {duplicate.first_line} and {duplicate.line}",
            "keep one of the two lines",
            origin=f"{path}:{duplicate.line}",
        )
        for duplicate in document.duplicates
    ]


def _split_override(source: Source, text: str) -> tuple[str, Any, str] | None:
    origin = text.origin if isinstance(text, Override) else COMMAND_LINE
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals or not key or key.startswith("-"):
        remedy = f"write {key.lstrip('-') or 'parallel.tp'}={raw or 'value'}"
        source.problems.append(Problem("override", text, "must be key=value", remedy, origin=origin))
        return None
    try:
        value = parse(raw).value
    except yaml.YAMLError as error:
        said = getattr(error, "problem", None) or str(error)
        problem = Problem(key, raw, f"is not a YAML value: {said}", "quote it", origin=origin)
        source.problems.append(problem)
        return None
    if isinstance(value, int | float) and takes_text_only(key):
        value = raw.strip()
    return key, _text_keys(value), origin


def _apply_override(source: Source, key: str, value: Any, origin: str) -> None:
    parts = key.split(".")
    if key == "model" and isinstance(value, str):
        _read_model_file(source, Path(value), origin=origin)
        source.origins["model"] = origin
        return
    if key in section_names():
        if not isinstance(value, dict):
            rule = "is a section, and takes a value only as a mapping of its keys"
            remedy = f"write {key}.KEY=value"
            source.problems.append(Problem(key, value, rule, remedy, origin=origin))
            return
        for name, inner in value.items():
            _apply_override(source, f"{key}.{name}", inner, origin)
        return
    in_mapping = len(parts) == 2 or ".".join(parts[:2]) in leaf_fields()
    if len(parts) == 1 or parts[0] not in section_names() or not in_mapping or not all(parts):
        source.problems.append(Problem(key, value, "is not a key", suggestion(key), origin=origin))
        return
    inner = source.tree
    for part in parts[:-1]:
        below = inner.get(part)
        if not isinstance(below, dict):
            below = inner[part] = {}
        inner = below
    inner[parts[-1]] = value
    source.origins[key] = origin
