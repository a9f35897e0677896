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
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Folder of a run, of one of its checkpoints, or of Hugging Face.")
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="New Hugging Face folder, or new FILE.yaml for the model section.")
    ],
    dtype: Annotated[FileDtype, typer.Option(help="Dtype of the weights.")] = FileDtype.float32,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Tokenizer to put beside them, a file or a folder.", show_default="the run's data.tokenizer"),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Let transformers compute with the export what our model does.")
    ] = True,
    debug: Debug = False,
) -> None:
    """Write a model as a Hugging Face folder, which transformers loads, or its model section as YAML.

    Examples:

      megatron-lite convert runs/quickstart my-model --dtype bfloat16

      megatron-lite convert Qwen2-7B qwen2.yaml
    """
    with errors_told(debug):
        from megatron_lite.checkpoint.convert import convert_model

        print(convert_model(source, out, dtype.value, tokenizer=tokenizer, check=check))
