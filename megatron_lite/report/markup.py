"""HTML from Python values: whatever is not markup already is escaped, so that no text of a run can become a tag."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

VOID = frozenset({"br", "input", "link", "meta"})


class Markup(str):
    """Text that is HTML."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: str | float | bool | None) -> Markup:
    """One element. A child that is not `Markup` is text.

    attributes: without an underscore at the end (``class_``), others become hyphens; True stands for an attribute
    without a value, None and False for none.
    """
    given = []
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            given.append(f" {key}")
        elif value is not None and value is not False:
            given.append(f' {key}="{escape(str(value))}"')
    if name in VOID:
        assert not children, f"<{name}> holds nothing"
        return Markup(f"<{name}{''.join(given)}>")
    return Markup(f"<{name}{''.join(given)}>{together(children)}</{name}>")


def together(children: Iterable[str], separator: str = "") -> Markup:
    """Several children as one."""
    return Markup(separator.join(child if isinstance(child, Markup) else escape(child) for child in children))
