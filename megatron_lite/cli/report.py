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
    """Sum up a run, and draw its loss, learning rate and gradient norm into loss.svg.

    Example:

      megatron-lite report runs/quickstart
    """
    with errors_told(debug):
        show_report(run)


def show_report(folder: Path) -> None:
    from rich.console import Console

    from megatron_lite.report.run import read_run
    from megatron_lite.report.summary import summary_table, write_picture

    run = read_run(folder)
    picture = write_picture(run)
    console = Console()
    console.print(summary_table(run))
    console.print(f"picture: {picture}", highlight=False, soft_wrap=True)
