"""Safetensors files: read slice by slice, written tensor by tensor. Nothing here ever unpickles anything."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_lite.utils.files import AtomicFile

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
NAMES_SHOWN = 10


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message names the file, the rule and the remedy."""


def list_some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError where it is missing, unreadable or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file; is {path.parent} the right folder?") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON ({error}); copy or download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold an object, not a {type(value).__name__}")
    return value


class TensorFiles:
    """The tensors of some safetensors files in a folder. Files stay open and mapped; only slices that are asked for
    are read.

    Raises CheckpointError for a file that is missing, truncated or not safetensors, or holds a dtype that is none of
    float64, float32, bfloat16 and float16.
    """

    def __init__(self, folder: Path, file_names: Iterable[str]) -> None:
        self.folder = folder
        self._handles: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        for file_name in file_names:
            handle = _open(folder / file_name)
            self._handles[file_name] = handle
            self._file_of.update(dict.fromkeys(handle.keys(), file_name))

    @property
    def names(self) -> list[str]:
        return list(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def path(self, name: str) -> Path:
        return self.folder / self._file_of[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slices(name).get_shape())

    def is_floating(self, name: str) -> bool:
        return self._slices(name).get_dtype() in DTYPE_NAMES.values()

    def dtype_name(self, name: str) -> str:
        return str(self._slices(name).get_dtype())

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Entries ``[start, stop)`` along ``dim`` of a tensor, on the CPU in the dtype of the file."""
        slices = self._slices(name)
        where = slice(start, slices.get_shape()[dim] if stop is None else stop)
        values: Tensor = slices[(slice(None),) * dim + (where,)]
        return values

    def _slices(self, name: str) -> Any:
        return self._handles[self._file_of[name]].get_slice(name)


def refuse_pickle(path: Path) -> None:
    """Raises CheckpointError where a file begins as pickles and the archives of ``torch.save`` do."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        return  # whoever reads it says why it cannot be read
    if start[8:] == b"{":
        return  # the length of a safetensors header, which may have the bytes of a pickle's start, and the header
    if (start[:1] == b"\x80" and len(start) > 1 and start[1] <= 5) or start[:4] == b"PK\x03\x04":
        raise CheckpointError(
            f"{path}: is a pickle, which can run any code when it is read, and is never opened here; "
            "use a checkpoint that megatron-lite wrote, or convert it to safetensors first"
        )


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file; copy or download the checkpoint again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        refuse_pickle(path)
        size = path.stat().st_size
        raise CheckpointError(
            f"{path}: is truncated or not a safetensors file ({size:,} bytes; {error}); copy or download it again"
        ) from error


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that a file is going to hold."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorWriter:
    """Writes one safetensors file, whole or not at all, holding no more than the tensor at hand.

    The plan is written first, as the header; the tensors then come in its order. ``digests`` has a hash of the bytes
    that were given for each tensor, for the check against what can be read back.

    Raises DataError where the disk is full or the folder cannot be written.
    """

    def __init__(self, path: Path, plan: Sequence[PlannedTensor], metadata: Mapping[str, str]) -> None:
        self.path, self.plan = path, tuple(plan)
        self.digests: dict[str, bytes] = {}
        self._file = AtomicFile(path)
        self._file.write(safetensors_header(self.plan, metadata))

    def write(self, name: str, tensor: Tensor) -> None:
        """Appends the next tensor of the plan, converted to its dtype."""
        planned = self.plan[len(self.digests)]
        assert (name, tuple(tensor.shape)) == (planned.name, planned.shape), f"{name} is not next: {planned}"
        data = as_bytes(tensor.detach().to(device="cpu", dtype=planned.dtype))
        self.digests[name] = hashlib.blake2b(data).digest()
        self._file.write(data)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._file.abort()
            return
        assert len(self.digests) == len(self.plan), f"{self.path}: {len(self.digests)} of {len(self.plan)} tensors"
        self._file.commit()

    def check(self) -> None:
        """Reads the finished file back.

        Raises CheckpointError where names, shapes, dtypes or bits are not those that were given.
        """
        files = TensorFiles(self.path.parent, [self.path.name])
        wrong = sorted({planned.name for planned in self.plan} ^ set(files.names))
        for planned in self.plan:
            if planned.name in wrong:
                continue
            found = files.read(planned.name)
            same_kind = tuple(found.shape) == planned.shape and found.dtype == planned.dtype
            if not same_kind or hashlib.blake2b(as_bytes(found)).digest() != self.digests[planned.name]:
                wrong.append(planned.name)
        if wrong:
            raise CheckpointError(
                f"{self.path}: what was read back is not what was written: {list_some(wrong)}; "
                "the disk may be failing, write to another one"
            )


def safetensors_header(plan: Sequence[PlannedTensor], metadata: Mapping[str, str]) -> bytes:
    """Length (8 bytes, little-endian) and JSON, padded with spaces so that the data starts at a multiple of 8 bytes
    (the safetensors format, https://github.com/huggingface/safetensors#format)."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for planned in plan:
        offsets = [at, at + planned.num_bytes]
        entries[planned.name] = {
            "dtype": DTYPE_NAMES[planned.dtype],
            "shape": list(planned.shape),
            "data_offsets": offsets,
        }
        at = offsets[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a CPU tensor, without a copy where it is contiguous."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
