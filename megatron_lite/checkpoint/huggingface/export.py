"""The export: a folder that ``transformers`` loads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lite.checkpoint.folders import PendingFolder, refuse_occupied
from megatron_lite.checkpoint.huggingface.check import (
    Checked,
    OwnForward,
    compare,
    import_transformers,
    refuse_too_large,
)
from megatron_lite.checkpoint.huggingface.config import CONFIG_FILE, config_to_hf
from megatron_lite.checkpoint.huggingface.differences import check_matches
from megatron_lite.checkpoint.huggingface.names import huggingface_parts
from megatron_lite.checkpoint.huggingface.reader import INDEX_FILE, SINGLE_FILE
from megatron_lite.checkpoint.huggingface.tokens import GENERATION_FILE, Tokens, tokens_of
from megatron_lite.checkpoint.shard_reader import PartTable
from megatron_lite.checkpoint.tensor_files import CheckpointError, PlannedTensor, TensorWriter
from megatron_lite.config.schema import ModelConfig
from megatron_lite.models.families import parameter_table
from megatron_lite.models.identity import ParameterTable
from megatron_lite.utils.files import AtomicFile

MAX_SHARD_BYTES = 5_000_000_000


def export_huggingface(
    folder: str | Path,
    model: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    *,
    tokenizer: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    check: bool = True,
) -> Checked | None:
    """Writes a checkpoint that ``AutoModelForCausalLM.from_pretrained`` loads, and ``AutoTokenizer`` with a tokenizer.

    tensors: (global name, whole parameter) in the order of the parameter table, tied ones left out; one at a time is
        held. dtype: of the files. tokenizer: a tokenizer file or folder; what lies beside a tokenizer.json of Hugging
        Face comes along. max_shard_bytes: largest file, bytes, unless a single tensor is larger; above it there are
        several files and an index. check: whether transformers has to compute with the folder what our model computes
        with ``tensors``.

    Before the folder gets its name every file is read back and compared, name by name and bit by bit, and with
    ``check`` transformers runs it on random tokens (longer than a sliding window, which is shortened for that): its
    logits may differ from ours by rounding alone. Our side of that needs the memory of one layer, transformers that of
    the whole model in float32. On an error nothing is left of the folder.

    Returns what transformers made of it; None without ``check``. Raises CheckpointError (an occupied folder, tensors
    that are not the model's, or not finite, a file that reads back differently, logits that differ, no transformers or
    too little memory to check) and DataError (no space left, a broken tokenizer).
    """
    refuse_occupied(folder)
    if check:
        import_transformers()
        refuse_too_large(model)
    tokens = Tokens() if tokenizer is None else tokens_of(model, tokenizer)
    table, parts = parameter_table(model), huggingface_parts(model)
    files = _split(_plan(table, parts, dtype), max_shard_bytes)
    names = [SINGLE_FILE] if len(files) == 1 else [_shard_name(i, len(files)) for i in range(len(files))]
    own = OwnForward(model, dtype) if check else None
    wholes = _checked(table, tensors, dtype)
    with PendingFolder(folder) as pending:
        _write_json(pending.path / CONFIG_FILE, config_to_hf(model, dtype) | tokens.ids)
        _write_json(pending.path / GENERATION_FILE, tokens.generation_config())
        for name, content in tokens.files.items():
            _write(pending.path / name, content)
        _write_tensors(pending.path, names, files, _to_parts(table, parts, own.watch(wholes) if own else wholes))
        if len(files) > 1:
            _write_json(pending.path / INDEX_FILE, _index(names, files))
        check_matches(pending.path, model)
        return compare(pending.path, own) if own else None


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


def _checked(
    table: ParameterTable, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The tensors in ``dtype`` on the CPU, if they are those of the table and finite."""
    given = iter(tensors)
    for spec in table:
        if spec.tied_to is not None:
            continue
        name, whole = next(given, ("nothing", None))
        if name != spec.name or whole is None or tuple(whole.shape) != spec.shape:
            found = name if whole is None else f"{name} {list(whole.shape)}"
            raise CheckpointError(
                f"the weights do not fit the model: {spec.name} {list(spec.shape)} comes next, and what came is "
                f"{found}; use the model section that the weights were trained with"
            )
        rounded = whole.detach().to("cpu", dtype)
        if not bool(rounded.isfinite().all()):
            raise _not_finite(name, whole, dtype)
        yield name, rounded
    extra = next(given, None)
    if extra is not None:
        raise CheckpointError(f"the weights do not fit the model: it has no {extra[0]}; use their own model section")


def _not_finite(name: str, whole: Tensor, dtype: torch.dtype) -> CheckpointError:
    wrong = int((~whole.isfinite()).sum())
    if wrong == 0:
        most, largest = torch.finfo(dtype).max, float(whole.abs().max())
        return CheckpointError(
            f"{name} has a weight of size {largest:.4g}, and {str(dtype).removeprefix('torch.')} ends at {most:.4g}: "
            "export in bfloat16 or float32; nothing was exported"
        )
    return CheckpointError(
        f"{wrong:,} of the {whole.numel():,} weights of {name} are NaN or infinite: the run has diverged, export an "
        "earlier checkpoint of it (convert RUN/checkpoints/step-N OUT); nothing was exported"
    )


def _to_parts(
    table: ParameterTable, parts: PartTable, wholes: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Our parameters as the tensors that Hugging Face stores, in the order of the table."""
    for name, whole in wholes:
        for part in parts[name]:
            yield part.name, part.cut(table[name], whole)


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


def _write_json(path: Path, value: dict[str, Any]) -> None:
    _write(path, (json.dumps(value, indent=2) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    with AtomicFile(path) as file:
        file.write(content)
