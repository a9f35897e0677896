"""megatron-lite report"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_lite.cli.common import Debug, errors_told


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    debug: Debug = False,
) -> None:
    """Sum up a run, and write report.html: its curves, its layout and its config on one page.

    The page needs no network. loss.svg is a picture for a README: loss, learning rate and gradient norm.

    Example:

      megatron-lite report runs/quickstart
    """
    with errors_told(debug):
        show_report(run)


def show_report(folder: Path) -> None:
    """Prints the numbers of a run, and writes its page and its picture."""
    from rich.console import Console

    from megatron_lite.report.curves import write_picture
    from megatron_lite.report.page import write_page
    from megatron_lite.report.run import read_run
    from megatron_lite.report.summary import facts_of, summary_table

    run = read_run(folder)
    facts = facts_of(run)
    written = {"report": write_page(run, facts), "picture": write_picture(run)}
    console = Console()
    console.print(summary_table(run, facts))
    for name, path in written.items():
        console.print(f"{name}: {path}", highlight=False, soft_wrap=True)
