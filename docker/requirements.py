"""Prints what a pyproject.toml requires, one requirement a line, so that an image has a layer of what seldom changes.

    python requirements.py PYPROJECT [--extras NAME,NAME] [--without PACKAGE]...

The extras of the project itself that an extra names are left out. Exits 2 for an extra that is not there.
"""

from __future__ import annotations

import argparse
import re
import tomllib
from pathlib import Path


def name_of(requirement: str) -> str:
    """The package that a requirement is about."""
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Print what a pyproject.toml requires.")
    parser.add_argument("pyproject", type=Path)
    parser.add_argument("--extras", default="", help="names from optional-dependencies, with commas between")
    parser.add_argument("--without", action="append", default=[], help="a package to leave out; may be given twice")
    options = parser.parse_args()
    project = tomllib.loads(options.pyproject.read_text(encoding="utf-8"))["project"]
    optional = project.get("optional-dependencies", {})
    extras = [extra.strip() for extra in options.extras.split(",") if extra.strip()]
    if unknown := [extra for extra in extras if extra not in optional]:
        parser.error(f"no extra {unknown[0]!r} in {options.pyproject}; there are {', '.join(sorted(optional))}")
    wanted = [*project.get("dependencies", ()), *(line for extra in extras for line in optional[extra])]
    left_out = {project["name"], *options.without}
    print("\n".join(line for line in wanted if name_of(line) not in left_out))


if __name__ == "__main__":
    main()
