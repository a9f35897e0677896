"""What the doctor says: sections of lines, each green, yellow or red; merged over hosts, as tables or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from megatron_lite.cli.common import EXIT_USER_ERROR

MOST_HOSTS_NAMED = 4


class Verdict(StrEnum):
    """green: as it should be. yellow: slower or smaller than it could be. red: to be mended; the doctor exits 2."""

    green = "green"
    yellow = "yellow"
    red = "red"


@dataclass(frozen=True)
class Line:
    """One thing that was looked at. remedy: what to do about it; empty where it is green."""

    check: str
    found: str
    verdict: Verdict = Verdict.green
    remedy: str = ""

    def __post_init__(self) -> None:
        assert bool(self.remedy) == (self.verdict is not Verdict.green), self


@dataclass(frozen=True)
class Section:
    """One part of what the doctor says: rows of a table, and what the user should mend."""

    name: str
    rows: Sequence[dict[str, Any]]  # all with the same keys, which head the columns
    problems: Sequence[str] = field(default=())


def of_lines(name: str, lines: Sequence[Line]) -> Section:
    """A section of this host alone."""
    return Section(name, [_row(line) for line in lines], [_problem(line) for line in lines if line.verdict == "red"])


def of_hosts(name: str, lines_of_host: dict[str, Sequence[Line]]) -> Section:
    """A section of several hosts: a line that is the same on some of them stands there once."""
    hosts_of: dict[Line, list[str]] = {}
    order = dict.fromkeys(line.check for lines in lines_of_host.values() for line in lines)
    for host, lines in lines_of_host.items():
        for line in lines:
            hosts_of.setdefault(line, []).append(host)
    merged = sorted(hosts_of, key=lambda line: list(order).index(line.check))
    rows = [{"hosts": named(hosts_of[line], len(lines_of_host)), **_row(line)} for line in merged]
    reds = [line for line in merged if line.verdict == "red"]
    problems = [f"{_problem(line)} (on {named(hosts_of[line], len(lines_of_host))})" for line in reds]
    return Section(name, rows, problems)


def named(hosts: Sequence[str], num_all: int) -> str:
    """Hosts in few words."""
    if len(hosts) == num_all > 1:
        return f"all {num_all}"
    more = f" and {len(hosts) - MOST_HOSTS_NAMED} more" if len(hosts) > MOST_HOSTS_NAMED else ""
    return ", ".join(hosts[:MOST_HOSTS_NAMED]) + more


def _row(line: Line) -> dict[str, Any]:
    return {"check": line.check, "verdict": line.verdict.value, "found": line.found, "remedy": line.remedy}


def _problem(line: Line) -> str:
    return f"{line.check}: {line.found}: {line.remedy}"


def print_report(sections: Sequence[Section], *, as_json: bool) -> int:
    """Returns the exit code."""
    _print_json(sections) if as_json else _print_tables(sections)
    return EXIT_USER_ERROR if any(section.problems for section in sections) else 0


def _print_json(sections: Sequence[Section]) -> None:
    print(json.dumps({section.name: asdict(section) for section in sections}, indent=1))


def _print_tables(sections: Sequence[Section]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for section in (section for section in sections if section.rows):
        table = Table(title=section.name, title_justify="left", box=None, header_style="bold")
        for name in section.rows[0]:
            table.add_column(name, overflow="fold")
        for row in section.rows:
            style = {"verdict": str(row.get("verdict", ""))}
            table.add_row(*(Text(str(value), style=style.get(key, "")) for key, value in row.items()))
        console.print(table)
        console.print()
    for problem in (problem for section in sections for problem in section.problems):
        console.print(f"to mend: {problem}", markup=False, highlight=False, soft_wrap=True)
