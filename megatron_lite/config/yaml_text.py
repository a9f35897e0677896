"""YAML as people mean it: ``3e-4`` is a number, ``off`` is a word, a key that is given twice is a mistake.

PyYAML follows YAML 1.1, where ``3e-4`` is text (no dot) and ``off`` is false. The loader here reads scalars by the
core schema of YAML 1.2; the writer quotes whatever either version would misread, so that its files are safe anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+)$")
_FLOAT = re.compile(
    r"^[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|"
    r"\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_SCALARS = (
    ("tag:yaml.org,2002:bool", _BOOL, "tTfF"),
    ("tag:yaml.org,2002:int", _INT, "-+0123456789"),
    ("tag:yaml.org,2002:float", _FLOAT, "-+0123456789."),
)
_REPLACED_TAGS = frozenset({tag for tag, _, _ in _SCALARS} | {"tag:yaml.org,2002:timestamp"})

MAX_DEPTH = 4
"""Levels of keys that are watched for duplicates: deeper than any key of the schema (model.rope_scaling.factor)."""


class _Loader(yaml.SafeLoader):
    """Reads plain scalars by the core schema of YAML 1.2."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else, and never writes anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag not in _REPLACED_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Dumper.yaml_implicit_resolvers = {
    first: list(resolvers) for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
}
for _tag, _regexp, _first in _SCALARS:
    _Loader.add_implicit_resolver(_tag, _regexp, list(_first))
    _Dumper.add_implicit_resolver(_tag, _regexp, list(_first))
_Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_list(value))


@dataclass(frozen=True)
class Duplicate:
    """A key that one mapping holds twice; lines count from 1."""

    key: str
    line: int
    first_line: int


@dataclass(frozen=True)
class Document:
    """A parsed YAML text: its value, the line (from 1) of each dotted key, and the keys that are given twice."""

    value: Any
    lines: Mapping[str, int] = field(default_factory=dict)
    duplicates: tuple[Duplicate, ...] = ()


def parse(text: str) -> Document:
    """Reads one YAML document. Raises ``yaml.YAMLError`` (with a mark: line and column) on broken syntax."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return Document(None)
        lines: dict[str, int] = {}
        duplicates: list[Duplicate] = []
        _walk(node, "", 0, lines, duplicates)
        return Document(loader.construct_document(node), lines, tuple(duplicates))
    finally:
        loader.dispose()


def _walk(node: yaml.Node, prefix: str, depth: int, lines: dict[str, int], duplicates: list[Duplicate]) -> None:
    if not isinstance(node, yaml.MappingNode) or depth >= MAX_DEPTH:
        return
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            continue
        name, line = key_node.value, key_node.start_mark.line + 1
        if name in seen:
            duplicates.append(Duplicate(prefix + name, line, seen[name]))
        seen.setdefault(name, line)
        lines[prefix + name] = line
        _walk(value_node, f"{prefix}{name}.", depth + 1, lines, duplicates)


def dump(value: Any) -> str:
    """Block YAML that `parse` reads back to the same value (tuples as lists)."""
    return _write(value, flow_style=False)


def flow(value: Any) -> str:
    """One line of YAML that `parse` reads back to the same value, as used on the command line."""
    if isinstance(value, list | tuple):
        return f"[{','.join(flow(entry) for entry in value)}]"  # no spaces: a shell needs no quotes
    try:
        text = _write(value, flow_style=True)
    except yaml.representer.RepresenterError:  # not a value of YAML: from a config that was made in Python
        return repr(value)
    return text.removesuffix("\n").removesuffix("\n...").strip()


def _write(value: Any, *, flow_style: bool) -> str:
    return yaml.dump(
        value, Dumper=_Dumper, default_flow_style=flow_style, sort_keys=False, allow_unicode=True, width=10**6
    )
