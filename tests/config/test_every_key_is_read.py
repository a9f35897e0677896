"""A key that nothing reads is a promise that nothing keeps: each one is read somewhere outside the config room."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

from megatron_lite.config.keys import leaf_fields

PACKAGE = Path(__file__).parents[2] / "megatron_lite"

AMBIGUOUS = frozenset(
    {"type", "name", "dir", "device", "schedule", "partition", "train", "eps", "family", "dp", "tp", "pp", "cp"}
)
"""Names that other objects have too: read only if the attribute is taken from the section, or from its config class."""


def attributes_read(sources: Iterable[str]) -> set[tuple[str, str]]:
    """(owner, attribute) of every attribute read in the sources; owner is the last name before the dot."""
    found: set[tuple[str, str]] = set()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                name = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
                found.add((name, node.attr))
    return found


def unread(sources: Iterable[str]) -> list[str]:
    read = attributes_read(sources)
    attributes = {attribute for _, attribute in read}
    missing = []
    for key in leaf_fields():
        section, _, name = key.rpartition(".")
        owners = {section.rpartition(".")[2], "config", "scaling", "settings", f"{section}_config"}
        is_read = any((owner, name) in read for owner in owners) if name in AMBIGUOUS else name in attributes
        if not is_read:
            missing.append(key)
    return missing


def test_every_key_is_read() -> None:
    rooms = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "config"]
    rooms.append(PACKAGE / "config" / "schema.py")  # its properties derive dp and the number of microbatches
    rooms.append(PACKAGE / "config" / "model.py")  # which layers have the sliding window
    rooms.append(PACKAGE / "config" / "optim.py")  # the weight decay at a learning rate
    missing = unread(path.read_text(encoding="utf-8") for path in rooms)
    assert not missing, "no code reads " + ", ".join(missing)


def test_a_key_that_nothing_reads_is_found() -> None:
    """Negative control."""
    assert "optim.eps" in unread(["config.optim.lr + layer.eps"])
    assert "optim.eps" not in unread(["config.optim.eps"])
    assert "optim.lr" not in unread(["config.optim.lr"])
    assert "train.seed" in unread(["train.seed = 3"]), "writing is not reading"
