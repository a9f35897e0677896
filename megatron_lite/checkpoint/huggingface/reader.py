"""The import: a folder of Hugging Face safetensors as a source of weights for any layout."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_lite.checkpoint.huggingface.names import HEAD, has_prefix, huggingface_parts, unknown_names
from megatron_lite.checkpoint.shard_reader import ShardReader
from megatron_lite.checkpoint.tensor_files import CheckpointError, TensorFiles, list_some, read_json
from megatron_lite.config.schema import ModelConfig
from megatron_lite.models.identity import ParameterTable

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARDS = "model-[0-9]*-of-[0-9]*.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def huggingface_weights(
    folder: str | Path, table: ParameterTable, model: ModelConfig, dtype: torch.dtype
) -> ShardReader:
    """A weight source for ``build``: each rank reads only its own slices, and gets them in ``dtype`` on the CPU.

    Reads ``model.safetensors`` or the files of ``model.safetensors.index.json``, with or without the prefix of the
    base model. All names and shapes are checked before the first value is read.

    Raises CheckpointError for a folder without safetensors, a file that is missing, truncated or left over, tensors
    that are missing, left over, or of another shape; the source raises it for weights that are NaN or infinite.
    """
    files = _open_files(Path(folder))
    with_prefix = has_prefix(model.family, files.names)
    parts = huggingface_parts(model, with_prefix=with_prefix)
    copies = {}
    if model.tie_embeddings and HEAD in files:
        copies = {parts["embedding.tokens.weight"][0].name: HEAD}
    reader = ShardReader(files, parts, table, dtype, copies)
    left_over = unknown_names(model, parts, files.names)
    if left_over:
        raise CheckpointError(
            f"{folder}: {len(left_over)} tensors have no place in this {model.family} model: {list_some(left_over)}; "
            "without them it would compute something else: use a checkpoint of the plain architecture"
        )
    return reader


def _open_files(folder: Path) -> TensorFiles:
    if (folder / SINGLE_FILE).is_file():
        return TensorFiles(folder, [SINGLE_FILE])
    if (folder / INDEX_FILE).is_file():
        return _open_indexed(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder; name the folder of a Hugging Face checkpoint")
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder}: has its weights only as pickles ({list_some(pickles)}), which can run any code when they are "
            "read and are never opened here: convert them to safetensors, in transformers with "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder, safe_serialization=True)"
        )
    raise CheckpointError(f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}; download the weights as well")


def _open_indexed(folder: Path) -> TensorFiles:
    path = folder / INDEX_FILE
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{path}: has no weight_map from tensors to files; copy or download it again")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{path}: names files outside of its folder: {list_some(outside)}")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{folder}: {len(absent)} of the {len(names)} files in {INDEX_FILE} are missing: {list_some(absent)}; "
            "download them as well"
        )
    extra = sorted(path.name for path in folder.glob(SHARDS) if path.name not in names)
    if extra:
        raise CheckpointError(
            f"{folder}: {list_some(extra)} is not in {INDEX_FILE}: the folder holds files of two checkpoints, or the "
            "index of another one; download it again into an empty folder, or remove what does not belong to it"
        )
    files = TensorFiles(folder, names)
    lacking = [f"{tensor} in {name}" for tensor, name in weight_map.items() if tensor not in files]
    if lacking:
        raise CheckpointError(
            f"{folder}: {len(lacking)} tensors of {INDEX_FILE} are missing from its files: {list_some(lacking)}; "
            "copy or download the checkpoint again"
        )
    return files
