"""Checkpoints: global tensors by name, written by the ranks of any layout and read by those of any other.

A checkpoint is a folder: ``checkpoint.json``, the manifest, and one safetensors file for each rank that had something
to write. It appears whole or not at all, and nothing of it is ever unpickled.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from megatron_lite.checkpoint.chunks import GlobalTensor
from megatron_lite.checkpoint.folders import PendingFolder
from megatron_lite.checkpoint.manifest import Manifest, read_manifest, refuse_damaged_files
from megatron_lite.checkpoint.planner import ChunkLoadPlanner, ChunkSavePlanner, one_object
from megatron_lite.checkpoint.shards import read_all
from megatron_lite.checkpoint.storage import FolderReader, FolderWriter, metadata_of, reads_of
from megatron_lite.checkpoint.tensor_files import CheckpointError
from megatron_lite.config.schema import ModelConfig
from megatron_lite.distributed.agreement import agreed, together
from megatron_lite.distributed.mesh import Axis

__all__ = ["load", "load_alone", "read_manifest", "save"]


def save(
    folder: str | Path, tensors: Sequence[GlobalTensor], *, state: dict[str, Any], model: ModelConfig, axis: Axis
) -> None:
    """Writes a checkpoint. Every rank of the axis calls it, with its own chunks.

    folder: the checkpoint's own, on a disk that all ranks share. It appears when everything is on the disk; one of
        this name is replaced then and not before. What saves that were killed have left beside it is removed.
    tensors: of float64, float32, bfloat16 or float16. The chunks of all ranks have to cover each of them exactly once.
    state: JSON, what `read_manifest` is to give back; that of the first rank is kept. model: what the weights are of.

    Raises CheckpointError on every rank if any of them finds the disk full, the folder read-only, or values that are
    NaN or infinite; nothing half-written is left, and other checkpoints are as they were.
    """
    pending = PendingFolder(folder)
    writer = FolderWriter(pending, state, model, axis.index)
    try:
        with _raised_as_ours(axis):
            dcp.save(
                one_object(tensors),
                storage_writer=writer,
                planner=ChunkSavePlanner(),
                process_group=axis.group,
                no_dist=axis.group is None,
            )
    finally:
        if axis.is_first:
            pending.discard()


def load(folder: str | Path, tensors: Sequence[GlobalTensor], *, axis: Axis) -> None:
    """Fills the chunks of ``tensors`` from a checkpoint. Every rank of the axis calls it, with its own chunks.

    Each rank reads the blocks that it needs, and checks each of them. Where the dtype of a chunk's memory is another
    one than the checkpoint's, the values are converted. Two tensors may have one name (both uses of a tied table).

    Raises CheckpointError on every rank: before anything is read, where names or shapes of all ranks' tensors are not
    those of the checkpoint, or files are missing, truncated or left over; while reading, where a block is damaged or
    values are NaN or infinite, and the memory is then of no use.
    """
    manifest = together(lambda: _open(folder), axis, CheckpointError)
    with _raised_as_ours(axis):
        dcp.load(
            one_object(tensors),
            storage_reader=FolderReader(manifest),
            planner=ChunkLoadPlanner(str(manifest.folder)),
            process_group=axis.group,
            no_dist=axis.group is None,
        )


def load_alone(manifest: Manifest, tensors: Sequence[GlobalTensor]) -> None:
    """Fills the chunks of some of a checkpoint's tensors, without other ranks. Raises CheckpointError as `load` does.

    The names and shapes have to be in the checkpoint.
    """
    planner = ChunkLoadPlanner(str(manifest.folder))
    planner.set_up_planner(one_object(tensors), metadata_of(manifest))
    read_all(manifest, reads_of(manifest, planner.create_local_plan(), planner))


def _open(folder: str | Path) -> Manifest:
    manifest = read_manifest(folder)
    refuse_damaged_files(manifest)
    return manifest


@contextlib.contextmanager
def _raised_as_ours(axis: Axis) -> Iterator[None]:
    """Of what went wrong on any rank, raises the first on every rank: users' errors as CheckpointError."""
    with contextlib.ExitStack() as stack:
        if axis.group is None:  # torch warns that a single process saves alone, which is what was asked for
            assert axis.size == 1
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        try:
            yield
        except CheckpointException as caught:
            first = caught.failures[min(caught.failures)][0]
            if isinstance(first, ValueError | OSError):
                raise agreed(CheckpointError(str(first)), axis) from caught
            raise first from caught
