"""The manifest of a checkpoint: what is in it, where, and with which checksums. JSON, written last, read defensively.

``checkpoint.json`` names every tensor with its dtype, its shape and the chunks that make it up, each with its file and
the byte at which it begins there; every file with its size and the CRC-32 of each of its blocks; the model section of
the config; and the state of the training that wrote it. It ends with a checksum of itself.
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_lite.checkpoint.chunks import Box, tiling_problem
from megatron_lite.checkpoint.tensor_files import (
    DTYPE_NAMES,
    CheckpointError,
    list_some,
    read_json,
    refuse_pickle,
)
from megatron_lite.config.schema import ModelConfig

MANIFEST_FILE = "checkpoint.json"
FORMAT = 1
# The unit of checksums and of reading: small enough for a core's cache, large enough that Python does not show.
BLOCK_BYTES = 1 << 20
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
DtypeName = Literal["F64", "F32", "F16", "BF16"]
_LARGEST = 1 << 62

Count = Annotated[int, Field(ge=0, le=_LARGEST)]


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class StoredChunk(_Stored):
    """A hyper-rectangle of a tensor: its place in the tensor, its file, and the byte at which it begins there."""

    file: str
    offsets: tuple[Count, ...]
    sizes: tuple[Count, ...]
    start: Count

    @property
    def box(self) -> Box:
        return Box(self.offsets, self.sizes)


class StoredTensor(_Stored):
    """dtype: as safetensors names it. chunks: cover the tensor exactly once."""

    dtype: DtypeName
    shape: tuple[Count, ...]
    chunks: tuple[StoredChunk, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


class StoredFile(_Stored):
    """bytes: its size. checksums: CRC-32 of each block of ``block_bytes``; the last block may be shorter."""

    bytes: Count
    checksums: tuple[Annotated[int, Field(ge=0, lt=1 << 32)], ...]


class _Description(_Stored):
    format: Literal[1]
    state: dict[str, Any]
    model: dict[str, Any]
    block_bytes: Annotated[int, Field(ge=8, le=1 << 30, multiple_of=8)]
    files: dict[str, StoredFile]
    tensors: dict[str, StoredTensor]
    checksum: Count


@dataclass(frozen=True)
class Manifest:
    """A checkpoint that is described consistently; whether its files are what it says is another question.

    state: what the training that wrote it wants to know again. model: what the weights are of.
    """

    folder: Path
    state: dict[str, Any]
    model: ModelConfig
    block_bytes: int
    files: dict[str, StoredFile]
    tensors: dict[str, StoredTensor]


def is_checkpoint(folder: Path) -> bool:
    return (folder / MANIFEST_FILE).is_file()


def manifest_text(
    state: dict[str, Any], model: ModelConfig, files: dict[str, StoredFile], tensors: dict[str, StoredTensor]
) -> str:
    """The JSON of a manifest. ``state`` has to be JSON, without NaN."""
    description: dict[str, Any] = {
        "format": FORMAT,
        "state": state,
        "model": model.model_dump(mode="json"),
        "block_bytes": BLOCK_BYTES,
        "files": {name: file.model_dump(mode="json") for name, file in files.items()},
        "tensors": {name: tensor.model_dump(mode="json") for name, tensor in tensors.items()},
    }
    return json.dumps(description | {"checksum": _checksum(description)}, allow_nan=False) + "\n"


def _checksum(description: dict[str, Any]) -> int:
    text = json.dumps(description, sort_keys=True, separators=(",", ":"))
    return zlib.crc32(text.encode("utf-8", "surrogatepass"))


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a checkpoint folder; reads no other file.

    Raises CheckpointError where it is missing, truncated, changed, not JSON or of another version, and where it
    contradicts itself: chunks that overlap, leave a hole or lie outside of their file, files outside of the folder.
    """
    folder = Path(folder)
    path = folder / MANIFEST_FILE
    refuse_pickle(path)
    try:
        values = read_json(path)
        checksum = values.pop("checksum", None)
        if values.get("format") != FORMAT:
            raise CheckpointError(
                f"{path}: is not a checkpoint of format {FORMAT}, which is all that can be read here; "
                "use the version of megatron-lite that wrote it"
            )
        if checksum != _checksum(values):
            raise CheckpointError(f"{path}: does not match its own checksum, so it is damaged; {_remedy(folder)}")
        # From the text once more: JSON has no tuples, and the strict check knows that only of text.
        description = _Description.model_validate_json(path.read_bytes())
        model = ModelConfig.model_validate(description.model)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path}: {where}: {first['msg']}; {_remedy(folder)}") from error
    except (OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; {_remedy(folder)}") from error
    problem = next(_contradictions(description), None)
    if problem is not None:
        raise CheckpointError(f"{path}: {problem}; {_remedy(folder)}")
    return Manifest(folder, description.state, model, description.block_bytes, description.files, description.tensors)


def _contradictions(description: _Description) -> Iterator[str]:
    for name, file in description.files.items():
        if name in ("", ".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
            yield f"names a file outside of its folder: {name!r}"
        if len(file.checksums) != -(-file.bytes // description.block_bytes):
            yield f"has {len(file.checksums)} checksums for the {file.bytes:,} bytes of {name}"
    taken: dict[str, list[tuple[int, int, str]]] = {name: [] for name in description.files}
    for name, tensor in description.tensors.items():
        for chunk in tensor.chunks:
            if chunk.file not in taken:
                yield f"{name} is said to be in {chunk.file!r}, which is not among its files"
                return
            if len(chunk.offsets) != len(chunk.sizes):
                yield f"a chunk of {name} has {len(chunk.offsets)} offsets and {len(chunk.sizes)} sizes"
                return
            itemsize = tensor.torch_dtype.itemsize
            stop = chunk.start + chunk.box.numel * itemsize
            if stop > description.files[chunk.file].bytes or chunk.start % itemsize:
                yield f"bytes {chunk.start:,} to {stop:,} of {name} are not in the {chunk.file} that it describes"
            taken[chunk.file].append((chunk.start, stop, name))
        problem = tiling_problem(tensor.shape, [chunk.box for chunk in tensor.chunks])
        if problem is not None:
            yield f"{name}: {problem}"
    for file_name, ranges in taken.items():
        ranges.sort()
        for (_, stop, one), (start, _, other) in itertools.pairwise(ranges):
            if start < stop:
                yield f"{one} and {other} share bytes of {file_name}"


def file_problems(manifest: Manifest) -> list[str]:
    """What is wrong with the files of a checkpoint as far as their sizes tell: missing, truncated, left over.

    Each names the file. Which bytes are in them is for `megatron_lite.checkpoint.shards` to check.
    """
    problems = []
    for name, file in manifest.files.items():
        path = manifest.folder / name
        try:
            size = path.stat().st_size
        except OSError as error:
            problems.append(f"{path}: is missing ({error.strerror})")
            continue
        if size != file.bytes:
            problems.append(f"{path}: has {size:,} bytes and was written with {file.bytes:,}")
    extra = sorted(path for path in manifest.folder.glob("*.safetensors") if path.name not in manifest.files)
    return problems + [f"{path}: does not belong to the checkpoint that {MANIFEST_FILE} describes" for path in extra]


def refuse_damaged_files(manifest: Manifest) -> None:
    """Raises CheckpointError with what `file_problems` finds."""
    for name in manifest.files:
        refuse_pickle(manifest.folder / name)
    problems = file_problems(manifest)
    if problems:
        raise CheckpointError(f"{list_some(problems)}; {_remedy(manifest.folder)}")


def _remedy(folder: Path) -> str:
    return f"copy the checkpoint again, or use another one of {folder.parent}"
