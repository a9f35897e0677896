"""megatron-lite convert"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from megatron_lite.cli.common import Debug, errors_told


class FileDtype(StrEnum):
    """Dtype of written weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def convert(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, or of its weights.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder.")],
    dtype: Annotated[FileDtype, typer.Option(help="Dtype of the weights.")] = FileDtype.float32,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="tokenizer.json to put beside them.", show_default="the run's data.tokenizer"),
    ] = None,
    debug: Debug = False,
) -> None:
    """Write the weights of a run as a Hugging Face folder, which transformers loads.

    Example:

      megatron-lite convert runs/quickstart my-model --dtype bfloat16
    """
    with errors_told(debug):
        from megatron_lite.checkpoint.convert import convert_run

        print(convert_run(source, out, dtype.value, tokenizer))
