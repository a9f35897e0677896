"""The keys of the schema as data: looked up by dotted name, described in words, listed for the help."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from megatron_lite.config.schema import RunConfig, Section
from megatron_lite.config.section import NameOrPath
from megatron_lite.config.yaml_text import flow

_TYPE_NAMES = {int: "integer", float: "number", bool: "true or false", str: "text"}
_LONG_EXPONENT = 50  # of a power of two that has more digits than anybody reads
_BOUNDS = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))


class KeyHelp(NamedTuple):
    """One line of the reference of config keys."""

    key: str
    type: str
    default: str
    description: str


def section_of(annotation: Any) -> type[Section] | None:
    """The section class inside an annotation such as ``RopeScaling | None``, or None for a plain value."""
    for member in _members(annotation):
        if isinstance(member, type) and issubclass(member, Section):
            return member
    return None


def _members(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(inner for member in get_args(annotation) for inner in _members(member))
    return (annotation,)


def iter_fields(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key below ``section`` with its field, depth first, sections before what is in them."""
    for name, field in section.model_fields.items():
        yield prefix + name, field
        inner = section_of(field.annotation)
        if inner is not None:
            yield from iter_fields(inner, f"{prefix}{name}.")


@cache  # every rule asks it for every key that it reads
def leaf_fields() -> Mapping[str, FieldInfo]:
    """The keys that take a value: all but the top-level sections. ``model.rope_scaling`` takes null or a mapping."""
    return {key: field for key, field in iter_fields() if "." in key}


def section_names() -> tuple[str, ...]:
    """Names of the top-level sections, in the order of the schema."""
    return tuple(RunConfig.model_fields)


def describe(field: FieldInfo) -> str:
    """What a key takes, in words: ``integer >= 1``, ``one of gpipe, 1f1b``, ``list of text, or one text``."""
    for item in field.metadata:
        if isinstance(item, NameOrPath):
            return str(item)
    members = _members(field.annotation)
    named = [_describe_member(member) for member in members if member is not type(None)]
    bounds = [f"{sign} {_bound(limit)}" for name, sign in _BOUNDS for limit in _bounds(field, name)]
    text = " or ".join(named) + (f" {' and '.join(bounds)}" if bounds else "")
    if any(getattr(item, "pattern", None) for item in field.metadata):
        text += " of letters, digits, '.', '_' and '-', starting with a letter or digit"
    return text + (" or null" if type(None) in members else "")


def with_article(description: str) -> str:
    """A description as the end of a sentence that says "must be"."""
    first = description.partition(" ")[0]
    article = {"integer": "an ", "number": "a ", "list": "a ", "mapping": "a "}.get(first, "")
    return article + description


def _describe_member(member: Any) -> str:
    if get_origin(member) is Literal:
        choices = [str(choice) for choice in get_args(member)]
        return "one of " + ", ".join(choices) if len(choices) > 1 else choices[0]
    if get_origin(member) is tuple:
        (item,) = _members(get_args(member)[0])
        if item is float:
            count = "positive" if get_args(member)[-1] is ... else len(get_args(member))
            return f"list of {count} numbers"
        if get_origin(item) is Literal:
            return f"{_describe_member(item)}, or a list of these"
        if item is int:
            return "list of integers" if get_args(member)[-1] is ... else f"list of {len(get_args(member))} integers"
        return "list of paths, or one path"
    if isinstance(member, type) and issubclass(member, Section):
        return "mapping with the keys " + ", ".join(member.model_fields)
    return _TYPE_NAMES[member]


def _bound(limit: Any) -> str:
    """2^100 and not 1.2676506002282294e+30."""
    fraction, exponent = math.frexp(limit)
    is_power = fraction == 0.5 and isinstance(limit, float) and abs(exponent) > _LONG_EXPONENT
    return f"2^{exponent - 1}" if is_power else str(limit)


def _bounds(field: FieldInfo, name: str) -> list[Any]:
    limits = (getattr(item, name, None) for item in field.metadata)
    return [limit for limit in limits if limit is not None]


def default_text(field: FieldInfo) -> str:
    """The default of a key in words: ``required``, the rule that derives it, or its value."""
    extra = field.json_schema_extra
    if isinstance(extra, Mapping) and "default" in extra:
        return str(extra["default"])
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=False)
    return default if isinstance(default, str) else flow(default)


def key_help() -> list[KeyHelp]:
    """Every key of a config, in the order of the schema, for ``--help`` and the documentation."""
    return [
        KeyHelp(key, describe(field), default_text(field), field.description or "")
        for key, field in leaf_fields().items()
    ]


def validate_value(field: FieldInfo, value: Any) -> Any:
    """The value as the field holds it. Raises ``pydantic.ValidationError`` if the field does not take it."""
    strict = ConfigDict(strict=True, allow_inf_nan=False)
    annotated: Any = Annotated  # to a type checker the field's annotation is a value
    # the None is for Annotated, which wants one entry at least; pydantic skips it
    adapter: TypeAdapter[Any] = TypeAdapter(annotated[field.annotation, None, *field.metadata], config=strict)
    return adapter.validate_python(value)


def takes(field: FieldInfo, value: Any) -> bool:
    """Whether a field takes a value."""
    try:
        validate_value(field, value)
    except ValidationError:
        return False
    return True


def takes_text_only(key: str) -> bool:
    """Whether a key holds text (or a list of it), so that ``run.name=2026`` on the command line means the text."""
    field = leaf_fields().get(key)
    return field is not None and takes(field, "text") and not any(takes(field, value) for value in (1, 1.5, True))


def suggestion(unknown: str) -> str:
    """What to write in place of a misspelt or misplaced key, or what there is to choose from, as a sentence."""
    near = _nearest_key(unknown)
    if near is not None:
        return f"did you mean {near}?"
    section = _nearest_section(unknown.rpartition(".")[0])
    if not section:
        return "the sections are " + ", ".join(section_names())
    return f"the keys are {', '.join(_keys_in(section).values())}"


def _nearest_key(unknown: str) -> str | None:
    """The section first, then the key inside it; a key of another section only where the name is all but its own."""
    section, _, leaf = unknown.rpartition(".")
    siblings = _keys_in(_nearest_section(section))
    if leaf in siblings:
        return siblings[leaf]
    same_leaf = [key for key in leaf_fields() if key.rpartition(".")[2] == leaf]
    if len(same_leaf) == 1:
        return same_leaf[0]
    close = difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.6)
    if close:
        return siblings[close[0]]
    if same_leaf:
        return same_leaf[0]
    leaves = {key.rpartition(".")[2]: key for key in leaf_fields()}
    return next((leaves[name] for name in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)), None)


def _keys_in(section: str) -> dict[str, str]:
    """Last part -> key, of all keys of a section; of the sections themselves for the empty name."""
    known = leaf_fields() if section else section_names()
    return {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == section}


def _nearest_section(name: str) -> str:
    """The section that a name most likely stands for, ``model.rope_scaling`` among them; empty if none is near."""
    sections = dict.fromkeys(key.rpartition(".")[0] for key in leaf_fields())
    return next(iter(difflib.get_close_matches(name, sections, n=1, cutoff=0.6)), "")


def nearest_value(field: FieldInfo, value: Any, siblings: Mapping[str, Any]) -> tuple[Any, ...]:
    """The legal value nearest to an illegal one, as a tuple of at most one; empty if nothing legal is near.

    siblings: what the user gave in the same section, on which a default may depend.
    """
    for candidate in _candidates(field, value, siblings):
        if takes(field, candidate):
            return (candidate,)
    return ()


def _candidates(field: FieldInfo, value: Any, siblings: Mapping[str, Any]) -> Iterator[Any]:
    yield from _readings(value)
    choices = [choice for member in _members(field.annotation) for choice in get_args(member) if choice is not ...]
    if any(get_origin(member) is Literal for member in _members(field.annotation)):
        yield from _nearest_choices(choices, value)
    for item in field.metadata:
        if isinstance(item, NameOrPath):
            yield from _nearest_choices(list(item.names), value)
    for member in _members(field.annotation):
        if get_origin(member) is tuple:
            yield from _candidate_lists(get_args(member)[0], value)
    if isinstance(field.json_schema_extra, Mapping) and "example" in field.json_schema_extra:
        example: Any = field.json_schema_extra["example"]
        entries = value if isinstance(value, list) else [value]
        yield [*entries, *example[len(entries) :]]  # too few
    if isinstance(value, int | float):
        yield from (limit for limit in _bounds(field, "ge") if value < limit)
        yield from (limit for limit in _bounds(field, "le") if value > limit)
    if isinstance(value, str):
        kept = "".join(char if char.isascii() and (char.isalnum() or char in "._-") else "-" for char in value)
        yield kept.strip("._-")
    if field.default_factory is None and not field.is_required():
        yield field.get_default(call_default_factory=False)
    if isinstance(field.json_schema_extra, Mapping) and "usual" in field.json_schema_extra:
        usual: Any = field.json_schema_extra["usual"]
        name = siblings.get("name")
        yield usual[name if isinstance(name, str) and name in usual else next(iter(usual))]


def _candidate_lists(item: Any, value: Any) -> Iterator[Any]:
    """What may have been meant for a list of ``item``."""
    entries = value if isinstance(value, list) else [value]
    if get_origin(item) is Literal:
        nearest = [near for entry in entries for near in _nearest_choices(list(get_args(item)), entry)]
        if nearest:
            yield nearest if isinstance(value, list) else nearest[0]
        return
    yield entries
    yield [str(entry) for entry in entries]
    if all(isinstance(entry, int | float) for entry in entries):
        yield [*entries, 0.0]  # one number too few


def _readings(value: Any) -> Iterator[Any]:
    """What else a scalar may have been meant to be: "8" is 8, 8.0 is 8, "yes" is true, 2026 is "2026"."""
    if isinstance(value, str):
        word = value.strip().lower()
        if word in ("true", "yes", "on"):
            yield True
        if word in ("false", "no", "off"):
            yield False
        for convert in (int, float):
            try:
                yield convert(word)
            except ValueError:
                continue
    elif isinstance(value, float) and abs(value) < 2**63:
        yield round(value)
    elif isinstance(value, int) and not isinstance(value, bool) and value in (0, 1):
        yield bool(value)
    if isinstance(value, bool):
        yield "off" if not value else "on"  # what YAML 1.1 makes of wandb: off
    if isinstance(value, int | float):
        yield str(value)


def _nearest_choices(choices: list[Any], value: Any) -> Iterator[Any]:
    if all(isinstance(choice, int) for choice in choices):
        if isinstance(value, int | float):
            yield min(choices, key=lambda choice: abs(choice - value))
    elif isinstance(value, str):
        yield from difflib.get_close_matches(value.lower(), choices, n=1, cutoff=0.3)
