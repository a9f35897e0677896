"""The weights of a checkpoint, for what needs nothing else of it: generating, evaluating, export."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_lite.checkpoint.chunks import Chunk, GlobalTensor, chunks_of
from megatron_lite.checkpoint.manifest import Manifest, is_checkpoint, read_manifest, refuse_damaged_files
from megatron_lite.checkpoint.planner import refuse_other_model
from megatron_lite.checkpoint.retention import apparent_problem
from megatron_lite.checkpoint.steps import list_steps
from megatron_lite.checkpoint.store import load_alone
from megatron_lite.checkpoint.tensor_files import CheckpointError, list_some
from megatron_lite.config.schema import ModelConfig
from megatron_lite.models.families import parameter_table
from megatron_lite.models.identity import ParameterSpec, WeightSource
from megatron_lite.utils import run_files

WEIGHTS = "weights/"

logger = logging.getLogger(__name__)


def find_checkpoint(folder: str | Path) -> Path:
    """The checkpoint that a user means by a folder: it itself, or the newest one of a run or of its checkpoints.

    Looks at manifests and sizes of files; bytes are checked when they are read. One that is damaged is skipped, with a
    warning that names the file.

    Raises CheckpointError where there is none.
    """
    folder, damaged = Path(folder), list[str]()
    if is_checkpoint(folder):
        return folder
    for checkpoint in (*reversed(list_steps(folder / run_files.CHECKPOINTS)), *reversed(list_steps(folder))):
        problem = apparent_problem(checkpoint)
        if problem is None:
            for one in damaged:
                _warn(f"skipped {one}")
            return checkpoint
        damaged.append(f"{checkpoint.name}: {problem}")
    if damaged:
        raise CheckpointError(
            f"{folder}: none of its {len(damaged)} checkpoints is whole; {list_some(damaged)}; copy one of them again"
        )
    raise CheckpointError(
        f"{folder}: has no checkpoint; name the folder of a run, its {run_files.CHECKPOINTS} folder, or one of the "
        "step-NNNNNNNN folders in there"
    )


@functools.cache
def _warn(message: str) -> None:
    """Once, however often the folder is looked at."""
    logger.warning("warning: %s", message)


def open_weights(folder: str | Path) -> tuple[ModelConfig, Callable[[torch.dtype], WeightSource]]:
    """The model of a checkpoint, and its weights: ``weights(dtype)`` gives a source that reads a rank's own shards.

    folder: a checkpoint, or a run or its checkpoints, of which the newest is taken. Asks no other rank.

    The source gives the follower of a tied pair its owner's values, also to a model that does not tie them.

    Raises CheckpointError for a folder without checkpoint, files that are missing or truncated, and tensors that are
    not the model's; the source raises it for blocks that are damaged and values that are NaN or infinite.
    """
    manifest = _open(folder)
    return manifest.model, lambda dtype: _source(manifest, dtype)


def iterate_weights(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """(global name, whole tensor in its stored dtype) of every parameter, in the order of the table.

    Tied ones are left out, and one is held at a time. folder and errors: as `open_weights`.
    """
    manifest = _open(folder)
    return (
        (spec.name, _source(manifest, manifest.tensors[WEIGHTS + spec.name].torch_dtype)(spec, 1, 0))
        for spec in parameter_table(manifest.model)
        if spec.tied_to is None
    )


def _open(folder: str | Path) -> Manifest:
    manifest = read_manifest(find_checkpoint(folder))
    refuse_damaged_files(manifest)
    stored = {name: tensor.shape for name, tensor in manifest.tensors.items() if name.startswith(WEIGHTS)}
    wanted = {WEIGHTS + spec.name: spec.shape for spec in parameter_table(manifest.model) if spec.tied_to is None}
    refuse_other_model(str(manifest.folder), stored, wanted)
    return manifest


def _source(manifest: Manifest, dtype: torch.dtype) -> WeightSource:
    owners = {follower: owner for owner, follower in parameter_table(manifest.model).tied_pairs()}

    def read(spec: ParameterSpec, tp: int, index: int) -> Tensor:
        """This rank's shard; rows that only pad are zero."""
        shape = spec.shard(tp, index).shape
        flat = torch.zeros(torch.Size(shape).numel(), dtype=dtype)
        chunks: tuple[Chunk, ...] = tuple(chunks_of(spec, tp, index, flat, 0))
        name = WEIGHTS + owners.get(spec.name, spec.tied_to or spec.name)
        stored = manifest.tensors.get(name)
        refuse_other_model(str(manifest.folder), {} if stored is None else {name: stored.shape}, {name: spec.shape})
        load_alone(manifest, [GlobalTensor(name, spec.shape, dtype, chunks)])
        return flat.view(shape)

    return read
