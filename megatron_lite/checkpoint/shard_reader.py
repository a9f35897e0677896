"""From tensors in files to the shards of a layout, reading no more than the shard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.checkpoint.tensor_files import CheckpointError, TensorFiles, list_some
from megatron_lite.models.identity import ParameterSpec, ParameterTable

ROWS_AT_ONCE = 4096  # of two tables that are compared: some 100 MB of each, for the widest models


@dataclass(frozen=True)
class Part:
    """Entries ``[start, stop)`` of a parameter along its sharded dimension, as a tensor of its own in a file.

    is_transposed: the file has the dimensions of the matrix the other way round.
    """

    name: str
    start: int
    stop: int
    is_transposed: bool = False

    def stored_shape(self, spec: ParameterSpec) -> tuple[int, ...]:
        dim = spec.shard_dim or 0
        shape = (*spec.shape[:dim], self.stop - self.start, *spec.shape[dim + 1 :])
        return shape[::-1] if self.is_transposed else shape

    def cut(self, spec: ParameterSpec, whole: Tensor) -> Tensor:
        """This part of the whole parameter, as the file stores it."""
        part = whole.narrow(spec.shard_dim or 0, self.start, self.stop - self.start)
        return part.t() if self.is_transposed else part


# Parameter -> the parts that make it up. A tied parameter is not stored.
PartTable = Mapping[str, tuple[Part, ...]]


class ShardReader:
    """A weight source that reads from files.

    dtype: of the shards that it gives.
    copies: name of a tensor in the files -> name of another that must equal it (both uses of a tied table, where a
        checkpoint stores both).

    Raises CheckpointError, at once for the whole model, where tensors are missing or have the wrong shape or dtype, or
    a copy differs: what one rank would refuse every rank does, before any of them waits for another. Weights that are
    not finite are refused where they are read, by the ranks that read them.
    """

    def __init__(
        self,
        files: TensorFiles,
        parts: PartTable,
        table: ParameterTable,
        dtype: torch.dtype,
        copies: Mapping[str, str] | None = None,
    ) -> None:
        self._files, self._parts, self._dtype = files, parts, dtype
        self._check(table)
        self._check_copies(copies or {})

    def _check(self, table: ParameterTable) -> None:
        missing, wrong = [], []
        for spec in table:
            for part in self._parts.get(spec.name, ()):
                if part.name not in self._files:
                    missing.append(part.name)
                elif self._files.shape(part.name) != part.stored_shape(spec):
                    found, expected = self._files.shape(part.name), part.stored_shape(spec)
                    wrong.append(
                        f"{part.name} in {self._files.path(part.name).name} is {list(found)}, not {list(expected)}"
                    )
                elif not self._files.is_floating(part.name):
                    wrong.append(f"{part.name} holds {self._files.dtype_name(part.name)}, not floats of 16 to 64 bits")
        problems = []
        if missing:
            total = sum(len(parts) for parts in self._parts.values())
            problems.append(f"{len(missing)} of {total} tensors are missing: {list_some(missing)}")
        if wrong:
            problems.append(f"{len(wrong)} tensors do not fit the model section: {list_some(wrong)}")
        if problems:
            raise CheckpointError(
                f"{self._files.folder}: {'; '.join(problems)}. The files have to be complete and to match the model: "
                "copy or download the checkpoint again, or set the model section to its config"
            )

    def _check_copies(self, copies: Mapping[str, str]) -> None:
        for name, copy in copies.items():
            if not self._are_equal(name, copy):
                raise CheckpointError(
                    f"{self._files.folder}: its config ties {copy} to {name}, and their values differ: set "
                    "tie_word_embeddings to false in its config.json, and model.tie_embeddings=false"
                )

    def _are_equal(self, name: str, other: str) -> bool:
        files, (rows, *_) = self._files, self._files.shape(name)
        if files.shape(other) != files.shape(name) or files.dtype_name(other) != files.dtype_name(name):
            return False
        return all(
            torch.equal(files.read(name, 0, start, stop), files.read(other, 0, start, stop))
            for start in range(0, rows, ROWS_AT_ONCE)
            for stop in (min(start + ROWS_AT_ONCE, rows),)
        )

    def __call__(self, spec: ParameterSpec, tp: int, index: int) -> Tensor:
        """This rank's shard; rows that only pad are zero. A tied parameter has the values of its owner."""
        dim = spec.shard_dim or 0
        shard = spec.shard(tp, index)
        local = torch.zeros(shard.shape, dtype=self._dtype)
        for piece in shard.pieces:
            for part in self._parts[spec.tied_to or spec.name]:
                start, stop = max(piece.start, part.start), min(piece.stop, part.stop)
                if start < stop:
                    target = local.narrow(dim, piece.local + start - piece.start, stop - start)
                    target.copy_(self._read(part, dim, start, stop))
        return local

    def _read(self, part: Part, dim: int, start: int, stop: int) -> Tensor:
        stored_dim = 1 - dim if part.is_transposed else dim
        values = self._files.read(part.name, stored_dim, start - part.start, stop - part.start)
        if not bool(values.isfinite().all()):
            raise CheckpointError(
                f"{self._files.path(part.name)}: {int((~values.isfinite()).sum()):,} of {values.numel():,} weights of "
                f"{part.name} are NaN or infinite: nothing can be computed from them; copy or download the checkpoint "
                "again, or use an earlier one"
            )
        return values.t() if part.is_transposed else values
