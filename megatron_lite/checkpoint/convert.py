"""From the weights of a run to a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_lite.checkpoint.huggingface import export_huggingface
from megatron_lite.checkpoint.tensor_files import CheckpointError
from megatron_lite.checkpoint.weights import DESCRIPTION_FILE, iterate_weights, load_weights
from megatron_lite.config.files import tokenizer_path
from megatron_lite.config.load import load_config
from megatron_lite.config.problems import ConfigError
from megatron_lite.config.schema import ModelConfig
from megatron_lite.utils import run_files


def convert_run(source: Path, out: Path, dtype: str, tokenizer: Path | None = None) -> str:
    """Writes the weights in ``source`` (the folder of a run, or of its weights) to ``out``; says what it wrote.

    tokenizer: by default the run's ``data.tokenizer``, where it still is. Raises CheckpointError and DataError.
    """
    weights = next((f for f in (source / run_files.WEIGHTS, source) if (f / DESCRIPTION_FILE).is_file()), None)
    if weights is None:
        raise CheckpointError(
            f"{source}: has no {run_files.WEIGHTS}/{DESCRIPTION_FILE} and no {DESCRIPTION_FILE}; name the folder of a "
            "run that came to its end with run.save_weights=true, or of its weights"
        )
    torch_dtype: torch.dtype = getattr(torch, dtype)
    model = ModelConfig.model_validate(load_weights(weights, torch_dtype)[0])
    chosen = tokenizer or _tokenizer_of(weights.parent / run_files.CONFIG)
    export_huggingface(out, model, iterate_weights(weights), torch_dtype, tokenizer=chosen)
    beside = f"with the tokenizer {chosen}" if chosen else "without a tokenizer (--tokenizer FILE adds one)"
    return f"{out}: {model.family} in {dtype}, {beside}"


def _tokenizer_of(config_file: Path) -> Path | None:
    """The tokenizer that the run's config names, if both are there."""
    if not config_file.is_file():
        return None
    try:
        name = load_config(config_file).data.tokenizer
    except ConfigError:
        return None
    return tokenizer_path(name) if name is not None and tokenizer_path(name).is_file() else None
