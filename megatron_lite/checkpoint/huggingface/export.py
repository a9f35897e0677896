"""The export: a folder that ``transformers`` loads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lite.checkpoint.folders import PendingFolder, refuse_occupied
from megatron_lite.checkpoint.huggingface.config import CONFIG_FILE, check_matches, config_to_hf
from megatron_lite.checkpoint.huggingface.names import huggingface_parts
from megatron_lite.checkpoint.huggingface.reader import INDEX_FILE, SINGLE_FILE
from megatron_lite.checkpoint.shard_reader import PartTable
from megatron_lite.checkpoint.tensor_files import CheckpointError, PlannedTensor, TensorWriter
from megatron_lite.config.schema import ModelConfig
from megatron_lite.data.tokenizer import end_of_document_id, load_tokenizer, tokenizer_vocab_size
from megatron_lite.models.families import parameter_table
from megatron_lite.models.identity import ParameterTable
from megatron_lite.utils.files import AtomicFile, DataError

MAX_SHARD_BYTES = 5_000_000_000


def export_huggingface(
    folder: str | Path,
    model: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    *,
    tokenizer: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a checkpoint that ``AutoModelForCausalLM.from_pretrained`` loads, and ``AutoTokenizer`` with a tokenizer.

    tensors: (global name, whole parameter) in the order of the parameter table, tied ones left out; one at a time is
        held. dtype: of the files. tokenizer: a tokenizer.json. max_shard_bytes: largest file, bytes, unless a single
        tensor is larger; above it there are several files and an index.

    Every file is read back and compared, name by name and bit by bit, before the folder gets its name; on an error
    nothing is left of it. Raises CheckpointError (an occupied folder, tensors that are not the model's, a file that
    reads back differently) and DataError (no space left, a broken tokenizer).
    """
    refuse_occupied(folder)
    tokens = None if tokenizer is None else _tokenizer_files(model, tokenizer)
    table, parts = parameter_table(model), huggingface_parts(model)
    files = _split(_plan(table, parts, dtype), max_shard_bytes)
    names = [SINGLE_FILE] if len(files) == 1 else [_shard_name(i, len(files)) for i in range(len(files))]
    with PendingFolder(folder) as pending:
        _write_json(pending.path / CONFIG_FILE, config_to_hf(model, dtype, tokens[1] if tokens else None))
        _write_json(pending.path / "generation_config.json", _generation_config(tokens[1] if tokens else None))
        for name, text in (tokens[0] if tokens else {}).items():
            _write_text(pending.path / name, text)
        _write_tensors(pending.path, names, files, _to_parts(table, parts, tensors))
        if len(files) > 1:
            _write_json(pending.path / INDEX_FILE, _index(names, files))
        check_matches(pending.path, model)


def _plan(table: ParameterTable, parts: PartTable, dtype: torch.dtype) -> list[PlannedTensor]:
    return [
        PlannedTensor(part.name, part.stored_shape(spec), dtype) for spec in table for part in parts.get(spec.name, ())
    ]


def _split(plan: Sequence[PlannedTensor], max_bytes: int) -> list[list[PlannedTensor]]:
    """The tensors of each file, filled in order."""
    files: list[list[PlannedTensor]] = [[]]
    size = 0
    for planned in plan:
        if files[-1] and size + planned.num_bytes > max_bytes:
            files.append([])
            size = 0
        files[-1].append(planned)
        size += planned.num_bytes
    return files


def _to_parts(
    table: ParameterTable, parts: PartTable, tensors: Iterable[tuple[str, Tensor]]
) -> Iterable[tuple[str, Tensor]]:
    """Our parameters as the tensors that Hugging Face stores, in the order of the table."""
    given = iter(tensors)
    for spec in table:
        if spec.name not in parts:
            continue
        name, whole = next(given, ("nothing", None))
        if name != spec.name or whole is None or tuple(whole.shape) != spec.shape:
            found = name if whole is None else f"{name} {list(whole.shape)}"
            raise CheckpointError(
                f"the weights do not fit the model: {spec.name} {list(spec.shape)} comes next, and what came is "
                f"{found}; use the model section that the weights were trained with"
            )
        for part in parts[spec.name]:
            yield part.name, part.cut(spec, whole)
    extra = next(given, None)
    if extra is not None:
        raise CheckpointError(f"the weights do not fit the model: it has no {extra[0]}; use their own model section")


def _write_tensors(
    folder: Path, names: list[str], files: list[list[PlannedTensor]], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    coming = iter(tensors)
    for name, plan in zip(names, files, strict=True):
        with TensorWriter(folder / name, plan, {"format": "pt"}) as writer:
            for _ in plan:
                writer.write(*next(coming))
        writer.check()
    assert next(coming, None) is None


def _shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _index(names: list[str], files: list[list[PlannedTensor]]) -> dict[str, Any]:
    pairs = [(planned, name) for name, plan in zip(names, files, strict=True) for planned in plan]
    total = sum(planned.num_bytes for planned, _ in pairs)
    return {"metadata": {"total_size": total}, "weight_map": {planned.name: name for planned, name in pairs}}


def _generation_config(eos_token_id: int | None) -> dict[str, Any]:
    tokens = {} if eos_token_id is None else {"bos_token_id": eos_token_id, "eos_token_id": eos_token_id}
    return {"_from_model_config": True, **tokens}


def _tokenizer_files(model: ModelConfig, source: str | Path) -> tuple[dict[str, str], int | None]:
    """The texts of the tokenizer's files, and the id of the token that ends a document."""
    tokenizer = load_tokenizer(source)
    size = tokenizer_vocab_size(tokenizer)
    if size > model.vocab_size:
        raise CheckpointError(
            f"{source}: has {size} tokens, and the model only {model.vocab_size}; "
            "use the tokenizer that its training data was made with"
        )
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
    end = None
    try:
        end = end_of_document_id(tokenizer)
        settings |= {"bos_token": tokenizer.id_to_token(end), "eos_token": tokenizer.id_to_token(end)}
    except DataError:
        pass  # a tokenizer of someone else's that ends documents by a name of its own, or not at all
    return {"tokenizer.json": tokenizer.to_str(pretty=True), "tokenizer_config.json": _json(settings)}, end


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _write_json(path: Path, value: dict[str, Any]) -> None:
    _write_text(path, _json(value))


def _write_text(path: Path, text: str) -> None:
    with AtomicFile(path) as file:
        file.write(text.encode())
