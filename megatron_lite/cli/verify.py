"""megatron-lite verify"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from megatron_lite.cli.common import EXIT_FAILURE, ConfigFile, Debug, Keys, Overrides, errors_told
from megatron_lite.cli.deepspeed import DeepSpeedFile, with_deepspeed


class ProofDtype(StrEnum):
    """Arithmetic of a proof."""

    float64 = "float64"
    float32 = "float32"


def verify(
    config: ConfigFile,
    overrides: Overrides = None,
    layouts: Annotated[
        str,
        typer.Option(
            help="'default', 'all' (tp, pp, dp, sp and ZeRO), 'pipeline' (every schedule, with recompute), 'zero' "
            "(every ZeRO stage and policy), or layouts such as 'tp=2,pp=2,dp=2,sp;pp=4,zb-v;dp=4,group=2,zero=3,keep'."
        ),
    ] = "default",
    dtype: Annotated[ProofDtype, typer.Option(help="Arithmetic: bound 1e-10 or 1e-5.")] = ProofDtype.float64,
    without: Annotated[
        str | None,
        typer.Option(help="Leave out a reduction, to see the proof fail; an unknown name lists them."),
    ] = None,
    deepspeed: DeepSpeedFile = None,
    keys: Keys = False,
    debug: Debug = False,
) -> None:
    """Prove that layouts compute the same thing.

    Trains a few steps of the config, or of a small copy of it, in one process and in each layout, and compares every
    gradient and every parameter. Needs no data. Exits 1 if a bound is broken, naming the first parameter and the axis.

    Examples:

      megatron-lite verify configs/runs/tiny-proof.yaml

      megatron-lite verify configs/runs/quickstart.yaml --layouts "tp=2,pp=2,dp=2,sp;pp=4,gpipe" --dtype float32

      megatron-lite verify configs/runs/tiny-proof.yaml --without tied-embeddings model.tie_embeddings=true
    """
    with errors_told(debug):
        from megatron_lite.verify.command import prove

        given = with_deepspeed(config, overrides or [], deepspeed)
        if not prove(config, given, layouts, dtype.value, without):
            raise typer.Exit(EXIT_FAILURE)
