"""The option --deepspeed: a DeepSpeed config between the YAML and the command line, and the table of what it became."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from megatron_lite.config.deepspeed import Line

DeepSpeedFile = Annotated[
    Path | None,
    typer.Option(
        "--deepspeed",
        metavar="JSON",
        help="DeepSpeed config whose stage, offload, precision, batch sizes, optimizer and scheduler replace those of "
        "CONFIG; says line by line what it took, and why not the rest.",
        show_default=False,
    ),
]

STYLES = {"taken": "green", "kept": "cyan", "ignored": "yellow", "refused": "red"}


def with_deepspeed(
    config: Path, overrides: list[str], file: Path | None, *, world_size: int | None = None, told: bool = True
) -> list[str]:
    """The overrides of a DeepSpeed config, if there is one, before those of the command line, which win.

    told: whether a line for each key goes to the console (stderr); of several ranks the first one's does.
    Raises ConfigError with everything in the file that is refused, after the lines.
    """
    if file is None:
        return overrides
    from megatron_lite.config.deepspeed import RefusedError, read_deepspeed

    try:
        reading = read_deepspeed(file, config, overrides, world_size=world_size)
    except RefusedError as error:
        if told:
            _tell(error.lines)
        raise
    if told:
        _tell(reading.lines)
    return [*reading.overrides, *overrides]


def _tell(lines: tuple[Line, ...]) -> None:
    from rich.console import Console

    print_lines(lines, Console(stderr=True))


def print_lines(lines: tuple[Line, ...], console: Console) -> None:
    """A table on a terminal; elsewhere plain text, one line a key."""
    if not console.is_terminal:
        for line in lines:
            ours = f" -> {' '.join(line.ours)}" if line.ours else ""
            note = f": {line.note}" if line.note else ""
            text = f"deepspeed {line.status.value:8}{line.key} = {line.given}{ours}{note}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        return
    from rich.table import Table
    from rich.text import Text

    table = Table("", "DeepSpeed", "becomes", "what differs, or why not", box=None, header_style="bold")
    for line in lines:
        status = Text(line.status.value, style=STYLES[line.status.value])
        table.add_row(status, Text(f"{line.key} = {line.given}"), Text("\n".join(line.ours)), Text(line.note))
    console.print(table)
