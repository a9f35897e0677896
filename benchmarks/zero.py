"""ZeRO stages beside those of DeepSpeed and FSDP2: `python benchmarks/zero.py --help`."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a script: the repository, not this folder, is where `benchmarks` is found
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import typer

from benchmarks import train_step
from benchmarks.rows import ROWS


class Size(StrEnum):
    of_25M = "25M"
    of_110M = "110M"


def _select(dtypes: str, processes: str, stages: str, variants: str) -> list[str]:
    """Rows `zero-DTYPE-dpN-stageS[-VARIANT]`; a variant that a layout does not have is left out."""
    parts = [[part.strip() for part in words.split(",")] for words in (dtypes, processes, stages)]
    suffixes = [""] + [f"-{variant.strip()}" for variant in variants.split(",") if variant.strip()]
    heads = [f"zero-{dtype}-dp{dp}-stage{stage}" for dtype in parts[0] for dp in parts[1] for stage in parts[2]]
    for head in heads:
        if head not in ROWS:
            known = "--dtype fp32,bf16 --processes 2,4 --stages 1,2,3"
            raise typer.BadParameter(f"there is no row {head}; there are those of {known}")
    return [head + suffix for head in heads for suffix in suffixes if head + suffix in ROWS]


def main(
    dtype: Annotated[str, typer.Option(help="Comma-separated: fp32, bf16.")] = "fp32,bf16",
    processes: Annotated[str, typer.Option(help="Comma-separated: 2, 4. All are data parallel.")] = "2,4",
    stages: Annotated[str, typer.Option(help="Comma-separated: 1, 2, 3.")] = "1,2,3",
    variants: Annotated[
        str,
        typer.Option(
            help="Comma-separated, beside the plain rows. m4: four microbatches a step (2 processes). keep: stage 3 "
            "that holds parameters from forward to backward. param: gradients in bf16."
        ),
    ] = "",
    size: Annotated[Size, typer.Option(help="Parameters of the Llama.")] = Size.of_25M,
    rounds: Annotated[int, typer.Option(min=1, help="Measured steps of each contender; medians want 7 or more.")] = 7,
    without: Annotated[str, typer.Option(help="Comma-separated contenders to leave out: deepspeed, fsdp2.")] = "",
    only: Annotated[train_step.Only, typer.Option(help="All contenders, or the peers, or ours.")] = train_step.Only.all,
    out: Annotated[Path | None, typer.Option(help="Write every measurement to this JSON file.")] = None,
    smoke: Annotated[bool, typer.Option(help="A tiny workload: does all of this work?")] = False,
) -> None:
    """Time whole optimizer steps under ZeRO 1, 2 and 3, in one microbatch a step, beside DeepSpeed and FSDP2.

    The peers run the plain torch Llama of benchmarks/peers with fused AdamW. FSDP2 does the work of stages 1 and 2 with
    reshard_after_forward=False and that of stage 3 with True. DeepSpeed: `DS_BUILD_OPS=0 pip install deepspeed`.
    In bf16 master weights and moments are in fp32; gradients are accumulated and reduced in fp32, or, in the variant
    param, in bf16. Printed as well: what a rank's collectives moved, in MiB and in parameters of the model (P); for
    ours it has to be what theory says.

    The method, the other columns and the checks are those of benchmarks/train_step.py.

    Example: python benchmarks/zero.py --dtype fp32 --processes 2 --size 110M --rounds 9 --out zero.json
    """
    train_step.main(
        rows=",".join(_select(dtype, processes, stages, variants)),
        rounds=rounds,
        warmup=1 if smoke else 2,
        out=out,
        smoke=smoke,
        workload=train_step.WorkloadName(size.value),
        only=only,
        without=without,
        cores=2,
        timeout=600.0,
    )


if __name__ == "__main__":
    typer.run(main)
