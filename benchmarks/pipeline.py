"""Pipeline schedules beside those of `torch.distributed.pipelining`: `python benchmarks/pipeline.py --help`."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a script: the repository, not this folder, is where `benchmarks` is found
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import typer

from benchmarks import train_step


class Precision(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"


def main(
    dtype: Annotated[Precision, typer.Option(help="Arithmetic of both.")] = Precision.fp32,
    schedules: Annotated[str, typer.Option(help="Comma-separated: gpipe, 1f1b, interleaved, zb-v; or all.")] = "all",
    rounds: Annotated[int, typer.Option(min=1, help="Measured steps of each contender; medians want 7 or more.")] = 7,
    out: Annotated[Path | None, typer.Option(help="Write every measurement to this JSON file.")] = None,
    smoke: Annotated[bool, typer.Option(help="A tiny workload: does all of this work?")] = False,
) -> None:
    """Time whole optimizer steps of a Llama on two pipeline ranks, in 8 microbatches, under each schedule that torch
    has too: same model, same cut, same tokens; interleaved and zb-v with two chunks a rank.

    The method, the columns and the checks are those of benchmarks/train_step.py.

    Example: python benchmarks/pipeline.py --schedules 1f1b,zb-v --rounds 9 --out pipeline.json
    """
    row = f"pipeline-{dtype.value}-"
    rows = ",".join(row + name.strip() for name in schedules.split(",")) if schedules != "all" else row
    train_step.main(
        rows=rows,
        rounds=rounds,
        warmup=1 if smoke else 2,
        out=out,
        smoke=smoke,
        workload=train_step.WorkloadName.W1,
        only=train_step.Only.all,
        without="",
        cores=2,
        timeout=600.0,
    )


if __name__ == "__main__":
    typer.run(main)
