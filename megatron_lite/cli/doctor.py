"""megatron-lite doctor"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_lite.cli.common import EXIT_USER_ERROR, Debug, Overrides, errors_told

if TYPE_CHECKING:
    from megatron_lite.ops.dispatch import Explanation


class Device(StrEnum):
    """Where an implementation would run."""

    cpu = "cpu"
    cuda = "cuda"


@dataclass(frozen=True)
class Section:
    """One part of what the doctor says: rows of a table, and what the user should mend."""

    name: str
    rows: Sequence[dict[str, Any]]  # all with the same keys, which head the columns
    problems: Sequence[str] = field(default=())


@dataclass(frozen=True)
class Request:
    """What the sections are asked for."""

    devices: Sequence[str]
    config: Path | None
    overrides: Sequence[str]
    verbose: bool


def doctor(
    overrides: Overrides = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Say what the kernels of this config will run.")
    ] = None,
    device: Annotated[
        list[Device] | None,
        typer.Option(help="Ask for a device, which need not be there. May be given twice.", show_default="those there"),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="For every backend that cannot run, say why.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Say what is installed, and which implementation of each operation runs on it, and why.

    Exits 2 if something should be mended: a library that does not load, a GPU whose kernels are not there, a config
    that asks for a backend which cannot run.

    Examples:

      megatron-lite doctor

      megatron-lite doctor --device cuda --verbose

      megatron-lite doctor --config configs/runs/quickstart.yaml kernels.attention=reference
    """
    if overrides and config is None:
        raise typer.BadParameter("keys replace those of a config: name it with --config")
    with errors_told(debug):
        import torch

        there = [Device.cpu, *([Device.cuda] if torch.cuda.is_available() else [])]
        request = Request(list(dict.fromkeys(one.value for one in device or there)), config, overrides or [], verbose)
        sections = [section for make in SECTIONS if (section := make(request)) is not None]
        _print_json(sections) if as_json else _print_tables(sections)
        if any(section.problems for section in sections):
            raise typer.Exit(EXIT_USER_ERROR)


def _environment(_request: Request) -> Section:
    from megatron_lite.ops import survey

    rows = [{"part": name, "state": state} for name, state in survey.environment().items()]
    return Section("environment", rows, survey.defects())


def _kernels(request: Request) -> Section:
    """One row for each op, device and backend that runs, with the dtypes for which it is the same for one reason."""
    from megatron_lite.ops import dispatch

    groups: dict[tuple[str, str, str, str], list[Explanation]] = {}
    for line in (line for device in request.devices for line in dispatch.table(device)):
        reason = _why(line)
        groups.setdefault((line.op, line.device, line.choice.backend, reason), []).append(line)
    rows = []
    for (op, device, backend, reason), lines in groups.items():
        dtypes = ", ".join(_short(line.dtype) for line in lines)
        row: dict[str, Any] = {"op": op, "device": device, "dtypes": dtypes, "runs": backend, "why": reason}
        if request.verbose:
            obstacles = {name: why for line in lines for name, why in line.obstacles.items()}
            row["cannot run"] = "\n".join(f"{name}: {why}" for name, why in obstacles.items()) or "-"
        rows.append(row)
    return Section("kernels", rows)


def _config(request: Request) -> Section | None:
    """What the section `kernels` of a config runs, in its precision and on its device."""
    if request.config is None:
        return None
    import torch

    from megatron_lite.config import load_config
    from megatron_lite.ops import dispatch

    config = load_config(request.config, request.overrides)
    chosen = config.run.device
    device = ("cuda" if torch.cuda.is_available() else "cpu") if chosen == "auto" else chosen
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}[config.train.precision]
    rows: list[dict[str, Any]] = []
    problems = []
    for op, requested in config.kernels:
        # The optimizer works on fp32 masters, whatever the parameters are.
        dtype = torch.float32 if op == "adamw" and precision != torch.float64 else precision
        row = {"key": f"kernels.{op}", "value": requested, "dtype": _short(dtype), "device": device}
        try:
            choice = dispatch.select(op, requested, dtype, device)
        except ValueError as error:
            problems.append(str(error))
            rows.append({**row, "runs": "nothing", "why": str(error)})
        else:
            why = _why(dispatch.explain(op, dtype, device)) if requested == "auto" else choice.reason
            rows.append({**row, "runs": choice.backend, "why": why})
    return Section("config", rows, problems)


# In the order in which they are shown. A new part of the doctor is a function in this list.
SECTIONS: tuple[Callable[[Request], Section | None], ...] = (_environment, _kernels, _config)


def _short(dtype: Any) -> str:
    from megatron_lite.ops import checks

    return checks.short(dtype)


def _why(line: Explanation) -> str:
    """Why this backend and none before it in the table, of those for the device; and which calls go elsewhere."""
    from megatron_lite.ops import checks, dispatch

    backends = [b for b in dispatch.BACKENDS[line.op] if b.devices is None or line.device in b.devices]
    names = [backend.name for backend in backends]
    reasons = []
    for backend in backends[: names.index(line.choice.backend)]:
        if line.dtype in backend.dtypes:
            reasons.append(f"{backend.name}: {line.obstacles[backend.name]}")
        else:
            reasons.append(f"{backend.name} takes {', '.join(sorted(map(checks.short, backend.dtypes)))} only")
    if not reasons:
        reasons = [dispatch.first_reason(line.device) if len(backends) > 1 else f"the only one for {line.device}"]
    if exception := backends[names.index(line.choice.backend)].exception:
        reasons.append(exception)
    return "; ".join(reasons)


def _print_json(sections: Sequence[Section]) -> None:
    import json

    print(json.dumps({section.name: asdict(section) for section in sections}, indent=1))


def _print_tables(sections: Sequence[Section]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for section in sections:
        table = Table(*section.rows[0], title=section.name, title_justify="left", box=None, header_style="bold")
        for row in section.rows:
            table.add_row(*map(str, row.values()))
        console.print(table, markup=False)
        console.print()
    for problem in (problem for section in sections for problem in section.problems):
        console.print(f"to mend: {problem}", markup=False, highlight=False, soft_wrap=True)
