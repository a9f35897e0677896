"""Where the bytes go and come from: the storage that torch.distributed.checkpoint writes to and reads from.

A rank writes one safetensors file. The coordinator makes the temporary folder when everybody's plan is known to be
sound, and when every rank has said that its file is on the disk it writes the manifest and renames the folder. There
is no pickle: torch's own file storage keeps its metadata in one, and nothing of it is used here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from megatron_lite.checkpoint.chunks import Box, Chunk
from megatron_lite.checkpoint.folders import PendingFolder, remove_leftovers
from megatron_lite.checkpoint.manifest import (
    MANIFEST_FILE,
    DtypeName,
    Manifest,
    StoredChunk,
    StoredFile,
    StoredTensor,
    manifest_text,
)
from megatron_lite.checkpoint.shards import Read, read_all, write_shard
from megatron_lite.checkpoint.tensor_files import DTYPE_NAMES, CheckpointError
from megatron_lite.config.schema import ModelConfig
from megatron_lite.utils.files import AtomicFile

T = TypeVar("T")


def shard_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _done(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future


@dataclass(frozen=True)
class _Place:
    """Where a chunk went; all chunks of a rank share one ``file``, and travel with it."""

    name: str
    file: StoredFile
    start: int


class FolderWriter(StorageWriter):
    """Writes a checkpoint into the place of ``pending``. rank: of this process among those that write together."""

    def __init__(self, pending: PendingFolder, state: dict[str, Any], model: ModelConfig, rank: int) -> None:
        self._pending, self._state, self._model, self._rank = pending, state, model, rank

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Makes the folder; all plans are there and no rank has begun to write."""
        remove_leftovers(self._pending.target.parent)
        self._pending.create()
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        if not plan.items:
            return _done([])
        name = shard_file(self._rank)
        chunks = []
        for item in plan.items:
            values = planner.resolve_data(item)
            assert item.index.offset is not None and isinstance(values, torch.Tensor)
            chunks.append((item.index.fqn, Chunk(tuple(item.index.offset), values)))
        file, starts = write_shard(self._pending.path / name, chunks)
        return _done(
            [
                WriteResult(item.index, chunk.values.nbytes, _Place(name, file, start))
                for item, (_, chunk), start in zip(plan.items, chunks, starts, strict=True)
            ]
        )

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes the manifest, and gives the folder its name."""
        places: dict[MetadataIndex, _Place] = {
            result.index: result.storage_data for of_rank in results for result in of_rank
        }
        files = {place.name: place.file for place in places.values()}
        self._check_visible(files)
        tensors = {
            name: _stored_tensor(name, kind, places)
            for name, kind in metadata.state_dict_metadata.items()
            if isinstance(kind, TensorStorageMetadata)
        }
        with AtomicFile(self._pending.path / MANIFEST_FILE) as file:
            file.write(manifest_text(self._state, self._model, files, tensors).encode())
        self._pending.publish()

    def _check_visible(self, files: dict[str, StoredFile]) -> None:
        for name, file in files.items():
            path = self._pending.path / name
            if not path.is_file() or path.stat().st_size != file.bytes:
                raise CheckpointError(
                    f"{self._pending.target}: a rank wrote {name}, and the first rank does not see it: the folder has "
                    "to be on a disk that all hosts share"
                )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _stored_tensor(name: str, kind: TensorStorageMetadata, places: dict[MetadataIndex, _Place]) -> StoredTensor:
    chunks = []
    for chunk in kind.chunks:
        place = places[MetadataIndex(name, chunk.offsets)]
        chunks.append(
            StoredChunk(file=place.name, offsets=tuple(chunk.offsets), sizes=tuple(chunk.sizes), start=place.start)
        )
    dtype = cast(DtypeName, DTYPE_NAMES[kind.properties.dtype])
    return StoredTensor(dtype=dtype, shape=tuple(kind.size), chunks=tuple(chunks))


def metadata_of(manifest: Manifest) -> Metadata:
    """A manifest in the words of torch.distributed.checkpoint."""
    return Metadata(
        {
            name: TensorStorageMetadata(
                properties=TensorProperties(dtype=tensor.torch_dtype),
                size=torch.Size(tensor.shape),
                chunks=[
                    ChunkStorageMetadata(offsets=torch.Size(chunk.offsets), sizes=torch.Size(chunk.sizes))
                    for chunk in tensor.chunks
                ],
            )
            for name, tensor in manifest.tensors.items()
        }
    )


class FolderReader(StorageReader):
    """Reads the checkpoint that a manifest describes."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return metadata_of(self._manifest)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        read_all(self._manifest, reads_of(self._manifest, plan, planner))
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def reads_of(manifest: Manifest, plan: LoadPlan, planner: LoadPlanner) -> Sequence[Read]:
    """What a plan wants of the files."""
    reads = []
    for item in plan.items:
        name, index = item.storage_index.fqn, item.storage_index.index
        assert index is not None
        box = Box(tuple(item.storage_offsets), tuple(item.lengths))
        reads.append(Read(name, manifest.tensors[name].chunks[index], box, planner.resolve_tensor(item)))
    return reads
