"""What the commands share: the arguments of a config, and how errors end a command."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

EXIT_FAILURE, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 130


def print_keys(wanted: bool) -> None:
    if not wanted:
        return
    from rich.console import Console
    from rich.table import Table

    from megatron_lite.config import key_help

    table = Table("key", "takes", "default", "what it is", box=None, header_style="bold")
    for entry in key_help():
        table.add_row(entry.key, entry.type, entry.default, entry.description)
    Console().print(table, markup=False)
    raise typer.Exit


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE...", help="Keys that replace those of the file.", show_default=False),
]
Keys = Annotated[
    bool, typer.Option("--keys", callback=print_keys, is_eager=True, help="List every key of a config, and exit.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@contextlib.contextmanager
def errors_told(debug: bool) -> Iterator[None]:
    """Ends the command with one message and its exit code, whatever goes wrong; ``debug`` adds the traceback."""
    from megatron_lite.distributed.faults import is_user_error

    try:
        yield
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        if is_user_error(error):
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(EXIT_USER_ERROR) from None
        hint = "" if debug else "; --debug shows where"
        print(f"error: {type(error).__name__}: {error}{hint}", file=sys.stderr)
        raise typer.Exit(EXIT_FAILURE) from None
