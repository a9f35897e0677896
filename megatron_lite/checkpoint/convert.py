"""From checkpoints and Hugging Face folders to Hugging Face folders, and to the model section of a config."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_lite.checkpoint.huggingface import export_huggingface, huggingface_weights, read_model
from megatron_lite.checkpoint.huggingface.config import CONFIG_FILE
from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.checkpoint.tensor_files import CheckpointError
from megatron_lite.checkpoint.weights import find_checkpoint, iterate_weights
from megatron_lite.config.files import tokenizer_path
from megatron_lite.config.load import load_config
from megatron_lite.config.problems import ConfigError
from megatron_lite.config.schema import ModelConfig
from megatron_lite.config.yaml_text import dump
from megatron_lite.models.families import parameter_table
from megatron_lite.utils import run_files
from megatron_lite.utils.files import AtomicFile

YAML_SUFFIXES = (".yaml", ".yml")


def convert_model(source: Path, out: Path, dtype: str, *, tokenizer: Path | None = None, check: bool = True) -> str:
    """Writes the model in ``source`` to ``out``; says what it wrote.

    source: a run, its checkpoints (of either the newest), one of them, or a Hugging Face folder. out: a new Hugging
    Face folder; or, by the ending .yaml, a new file with the model section alone. dtype: of the weights. tokenizer:
    by default the run's ``data.tokenizer``, where it still is, or that of the Hugging Face folder that it began from.
    check: as in `export_huggingface`.

    Raises CheckpointError and DataError.
    """
    if out.suffix in YAML_SUFFIXES:
        return _write_model_section(source, out)
    model, tensors = _open(source)
    chosen = tokenizer or tokenizer_of(source)
    report = export_huggingface(out, model, tensors, getattr(torch, dtype), tokenizer=chosen, check=check)
    beside = f"with the tokenizer {chosen}" if chosen else "without a tokenizer (--tokenizer FILE adds one)"
    checked = "not checked against transformers"
    if report is not None:
        checked = f"transformers computes the same logits, but for rounding ({report.difference:.1g} of the largest)"
    if report is not None and not report.reads_tokenizer:
        checked += (
            f"; its AutoTokenizer replaces the tokenizer's rules by those of {model.family}'s own: load it with "
            "PreTrainedTokenizerFast.from_pretrained instead"
        )
    return f"{out}: {model.family} in {dtype}, {beside}; {checked}"


def _open(source: Path) -> tuple[ModelConfig, Iterator[tuple[str, Tensor]]]:
    """The model, and its whole parameters one by one."""
    if not _is_huggingface(source):
        return read_manifest(find_checkpoint(source)).model, iterate_weights(source)
    model = read_model(source)
    table = parameter_table(model)
    weights = huggingface_weights(source, table, model, torch.float32)
    return model, ((spec.name, weights(spec, 1, 0)) for spec in table if spec.tied_to is None)


def _is_huggingface(source: Path) -> bool:
    return (source / CONFIG_FILE).is_file()


def _write_model_section(source: Path, out: Path) -> str:
    if out.exists():
        raise CheckpointError(f"{out}: is there already; remove it, or name a new file")
    model = read_model(source) if _is_huggingface(source) else read_manifest(find_checkpoint(source)).model
    size = f"{parameter_table(model).num_parameters:,} weights"
    with AtomicFile(out) as file:
        file.write(f"# {size}. The model of {source}.\n{dump(model.model_dump())}".encode())
    begin = f" init.from_hf={source}" if _is_huggingface(source) else ""
    return f"{out}: {model.family}, {size}; train it with model={out}{begin}"


def tokenizer_of(source: Path) -> Path | None:
    """The tokenizer that belongs to the model, if it is there."""
    if _is_huggingface(source):
        return _existing(source)
    checkpoint = find_checkpoint(source).resolve()
    file = next((f / run_files.CONFIG for f in checkpoint.parents[:2] if (f / run_files.CONFIG).is_file()), None)
    if file is None:
        return None
    try:
        config = load_config(file)
    except ConfigError:
        return None
    names = (config.data.tokenizer, config.init.from_hf)
    return next((found for name in names if name is not None and (found := _existing(name)) is not None), None)


def _existing(name: str | Path) -> Path | None:
    return tokenizer_path(name) if tokenizer_path(name).is_file() else None
