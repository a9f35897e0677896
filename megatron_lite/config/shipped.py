"""Files that come with the package and are no Python: in a checkout at its root, in an install beside the modules."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# A checkout, and the folder of an install that setup.py lays out like one.
ROOTS = (PACKAGE.parent, PACKAGE / "_shipped")


def shipped_root(path: str) -> Path:
    """The folder below which a file of the checkout is, such as 'launch/local.sh'. Raises FileNotFoundError."""
    for root in ROOTS:
        if (root / path).exists():
            return root
    raise FileNotFoundError(f"{path} is neither in a checkout nor in this install of megatron_lite; reinstall it")


def shipped(path: str) -> Path:
    """Where it is. Raises FileNotFoundError."""
    return shipped_root(path) / path


def shipped_files(folder: str, pattern: str) -> list[Path]:
    """The files of a folder of the checkout, by name."""
    return sorted(shipped(folder).glob(pattern))
