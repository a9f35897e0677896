"""What is saved and loaded by whom: the planners that torch.distributed.checkpoint asks.

Its unit is the same as ours, a hyper-rectangle of a global tensor, and it finds which rectangles of a checkpoint meet
which rectangles of this rank's memory. What is ours is the memory (chunks of flat buckets, not tensors of their own),
and the checks: before a byte is written, that all ranks together have every element exactly once; before a byte is
read, that names and shapes are those of the checkpoint.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_lite.checkpoint.chunks import Box, GlobalTensor, tiling_problem
from megatron_lite.checkpoint.tensor_files import DTYPE_NAMES, CheckpointError, list_some

_TENSORS = "tensors"


def one_object(tensors: Iterable[GlobalTensor]) -> dict[str, Any]:
    """What the planners get as a state dict: all tensors as one object, since torch logs a record for each.

    What has one name and several places in memory (both uses of a tied table) is put together, and chunks without
    elements are left out.
    """
    table: dict[str, GlobalTensor] = {}
    for tensor in tensors:
        known = table.get(tensor.name)
        assert known is None or known.shape == tensor.shape, f"{tensor.name}: {known.shape} and {tensor.shape}"
        chunks = tuple(chunk for chunk in tensor.chunks if chunk.values.numel())
        table[tensor.name] = dataclasses.replace(tensor, chunks=(known.chunks if known else ()) + chunks)
    return {_TENSORS: table}


def _metadata_of(offsets: Sequence[int], sizes: Sequence[int]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))


class ChunkSavePlanner(SavePlanner):
    """Plans the saving of `GlobalTensor`s. Every element has to be in the chunks of exactly one rank.

    Raises CheckpointError on all ranks where an element is missing or there twice, or ranks disagree about a tensor.
    """

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        self._tensors: dict[str, GlobalTensor] = state_dict[_TENSORS]
        for tensor in self._tensors.values():
            assert tensor.dtype in DTYPE_NAMES, f"{tensor.name}: {tensor.dtype}"
            assert all(chunk.values.dtype == tensor.dtype for chunk in tensor.chunks), f"{tensor.name}: its chunks"
        self._values = {
            MetadataIndex(tensor.name, chunk.offsets): chunk.values
            for tensor in self._tensors.values()
            for chunk in tensor.chunks
        }

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                index=MetadataIndex(tensor.name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=_metadata_of(chunk.offsets, chunk.sizes),
                    properties=TensorProperties(dtype=tensor.dtype),
                    size=torch.Size(tensor.shape),
                ),
            )
            for tensor in self._tensors.values()
            for chunk in tensor.chunks
        ]
        return SavePlan(items, planner_data={t.name: (t.shape, t.dtype) for t in self._tensors.values()})

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        expected = _agreed([plan.planner_data for plan in all_plans])
        plans, metadata = create_default_global_save_plan(
            [dataclasses.replace(p, planner_data=None) for p in all_plans]
        )
        for name, (shape, _) in expected.items():
            stored = metadata.state_dict_metadata.get(name)
            chunks = stored.chunks if isinstance(stored, TensorStorageMetadata) else []
            problem = tiling_problem(shape, [Box(tuple(c.offsets), tuple(c.sizes)) for c in chunks])
            if problem is not None:
                raise CheckpointError(f"the ranks together do not have {name} exactly once: {problem}")
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._values[write_item.index]


Kinds = dict[str, tuple[tuple[int, ...], torch.dtype]]


def _agreed(of_ranks: Iterable[Kinds]) -> Kinds:
    """Shape and dtype of each tensor that any rank names."""
    agreed: Kinds = {}
    for kinds in of_ranks:
        for name, kind in kinds.items():
            if agreed.setdefault(name, kind) != kind:
                raise CheckpointError(f"the ranks disagree about {name}: {agreed[name]} and {kind}")
    return agreed


class ChunkLoadPlanner(LoadPlanner):
    """Plans the loading into `GlobalTensor`s: what all ranks together ask for has to be what the checkpoint has.

    where: the checkpoint, for messages. Raises CheckpointError on all ranks, before anything is read, with the names
    that are missing and left over and the shapes that differ.
    """

    def __init__(self, where: str) -> None:
        self._where = where

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None
        self._tensors: dict[str, GlobalTensor] = state_dict[_TENSORS]
        self._metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for tensor in self._tensors.values():
            stored = self._metadata.state_dict_metadata.get(tensor.name)
            if isinstance(stored, TensorStorageMetadata) and tuple(stored.size) == tensor.shape:
                chunks = [_metadata_of(chunk.offsets, chunk.sizes) for chunk in tensor.chunks]
                items += create_read_items_for_chunk_list(tensor.name, stored, chunks)
        return LoadPlan(items, planner_data={t.name: t.shape for t in self._tensors.values()})

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        wanted = {name: shape for plan in global_plan for name, shape in plan.planner_data.items()}
        stored = {
            name: tuple(kind.size)
            for name, kind in self._metadata.state_dict_metadata.items()
            if isinstance(kind, TensorStorageMetadata)
        }
        refuse_other_model(self._where, stored, wanted)
        return [dataclasses.replace(plan, planner_data=None) for plan in global_plan]

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("checkpoints hold tensors; everything else is in their manifest")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The memory that a read item fills."""
        index = read_item.dest_index.index
        assert index is not None
        values = self._tensors[read_item.dest_index.fqn].chunks[index].values.detach()
        for dim, (offset, size) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            values = values.narrow(dim, offset, size)
        return values

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass  # it was filled in place


def refuse_other_model(where: str, stored: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError unless both have the same names and shapes."""
    missing = [name for name in wanted if name not in stored]
    extra = [name for name in stored if name not in wanted]
    differing = [
        f"{name} is {list(stored[name])} there and {list(shape)} here"
        for name, shape in wanted.items()
        if name in stored and stored[name] != tuple(shape)
    ]
    problems = []
    if missing:
        problems.append(f"it lacks {len(missing)} of this model's {len(wanted)} tensors: {list_some(missing)}")
    if extra:
        problems.append(f"it has {len(extra)} that this model has not: {list_some(extra)}")
    if differing:
        problems.append(f"{len(differing)} have another shape: {list_some(differing)}")
    if problems:
        raise CheckpointError(
            f"{where}: is a checkpoint of another model: {'; '.join(problems)}. Use the model section (and the "
            "optimizer) that it was written with, or start anew with --resume none"
        )
