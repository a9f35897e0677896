"""The weights of a run as whole tensors by global name: written by any layout, read by any other.

A folder holds ``weights.json`` (the model section, and the file of each parameter) and one safetensors file for each
pipeline stage. A tied parameter is stored once, under the name of its owner. Which stage wrote a tensor is all that
the layout leaves behind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from megatron_lite.checkpoint.folders import PendingFolder
from megatron_lite.checkpoint.shard_reader import ShardReader, same_names
from megatron_lite.checkpoint.tensor_files import (
    CheckpointError,
    PlannedTensor,
    TensorFiles,
    TensorWriter,
    list_some,
    read_json,
)
from megatron_lite.config.schema import ModelConfig
from megatron_lite.distributed import collectives
from megatron_lite.distributed.agreement import raise_together, together
from megatron_lite.distributed.mesh import Axis, Mesh
from megatron_lite.models.families import parameter_table
from megatron_lite.models.identity import ParameterSpec, ParameterTable, assemble
from megatron_lite.utils.files import AtomicFile

DESCRIPTION_FILE = "weights.json"


def save_weights(
    folder: str | Path,
    model: ModelConfig,
    *,
    mesh: Mesh,
    table: ParameterTable,
    names: Iterable[str],
    master: Callable[[str], Tensor],
    dtype: torch.dtype,
) -> None:
    """Writes the weights of all stages, whole, in ``dtype``. Every rank of the mesh calls it.

    folder: on a disk that all ranks share; it appears when it is complete, and replaces one that was there.
    names: the parameters of this rank's stage. master: this rank's shard of one of them, whole over dp (the
    engine's ``whole_master``). dtype: of the files; the master dtype loses no bit.

    The first rank of each stage writes, and holds one parameter at a time.

    Raises CheckpointError on every rank if any of them could not write, and leaves nothing half-written.
    """
    pending, here = PendingFolder(folder), set(names)
    own = [spec for spec in table if spec.name in here and spec.tied_to is None]
    try:
        _on_first(mesh, pending.create)
        error = _write_stage(pending.path, own, mesh, master, dtype)
        raise_together(error, mesh.world, CheckpointError)
        files = _files_of_stages(mesh, [spec.name for spec in own])
        _on_first(mesh, lambda: _finish(pending, model, files))
    finally:
        if mesh.world.is_first:
            pending.discard()


def load_weights(folder: str | Path, dtype: torch.dtype) -> tuple[dict[str, Any], ShardReader]:
    """The model section that the weights were written with, and a weight source that gives them in ``dtype``.

    Raises CheckpointError for a folder that is not of `save_weights`, and for missing or truncated files.
    """
    model, files = _open(Path(folder))
    table = parameter_table(model)
    return model.model_dump(), ShardReader(files, same_names(table), table, dtype)


def iterate_weights(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """(global name, whole tensor in the dtype of the file) of every stored parameter, in the order of the table."""
    model, files = _open(Path(folder))
    table = parameter_table(model)
    ShardReader(files, same_names(table), table, torch.float32)  # refuses an incomplete folder before the first tensor
    return ((spec.name, files.read(spec.name)) for spec in table if spec.tied_to is None)


def stage_file(stage: int, num_stages: int) -> str:
    return f"stage-{stage:05d}-of-{num_stages:05d}.safetensors"


def _write_stage(
    folder: Path, own: list[ParameterSpec], mesh: Mesh, master: Callable[[str], Tensor], dtype: torch.dtype
) -> Exception | None:
    """Gathers the stage's parameters one by one on its first rank, which writes them; returns what went wrong there.

    A rank that cannot write goes on gathering, so that no other waits for it.
    """
    gathered = _gather_each(own, mesh, master)
    error = None
    if mesh.dp.is_first and mesh.cp.is_first and mesh.ep.is_first and mesh.tp.is_first:
        plan = [PlannedTensor(spec.name, spec.shape, dtype) for spec in own]
        try:
            with TensorWriter(folder / stage_file(mesh.pp.index, mesh.pp.size), plan, {"format": "pt"}) as writer:
                for spec, shards in gathered:
                    writer.write(spec.name, assemble(spec, shards))
        except ValueError as caught:
            error = caught
    for _ in gathered:
        pass
    return error


def _gather_each(
    own: list[ParameterSpec], mesh: Mesh, master: Callable[[str], Tensor]
) -> Iterator[tuple[ParameterSpec, list[Tensor]]]:
    """Each parameter with its shards; the first rank of the stage has those of all tp ranks."""
    for spec in own:
        local = master(spec.name)
        is_replica = not (mesh.dp.is_first and mesh.cp.is_first and mesh.ep.is_first)
        yield spec, [] if is_replica else _gather_on_first(local, mesh.tp)


def _gather_on_first(local: Tensor, axis: Axis) -> list[Tensor]:
    """The shards of all ranks of the axis, on the CPU of its first rank; nothing on the others.

    All shards of a parameter have one shape.
    """
    if axis.index > 0:
        collectives.start_send(local.contiguous(), axis, 0).wait()
        return []
    others = (collectives.start_receive(torch.empty_like(local), axis, index) for index in range(1, axis.size))
    return [local.cpu(), *(pending.wait().cpu() for pending in others)]


def _files_of_stages(mesh: Mesh, own: list[str]) -> dict[str, str]:
    """The file of every parameter, from what each stage wrote."""
    by_stage = dict(collectives.gather_objects((mesh.pp.index, own), mesh.world))
    return {name: stage_file(stage, mesh.pp.size) for stage in sorted(by_stage) for name in by_stage[stage]}


def _finish(pending: PendingFolder, model: ModelConfig, files: dict[str, str]) -> None:
    table = parameter_table(model)
    # Reads the headers back, and refuses an incomplete folder.
    ShardReader(TensorFiles(pending.path, sorted(set(files.values()))), same_names(table), table, torch.float32)
    description = {"format": 1, "model": model.model_dump(), "files": files}
    with AtomicFile(pending.path / DESCRIPTION_FILE) as file:
        file.write((json.dumps(description, indent=2) + "\n").encode())
    pending.publish()


def _on_first(mesh: Mesh, action: Callable[[], None]) -> None:
    """Runs the action on the first rank; if it fails there, every rank raises CheckpointError."""
    together(action if mesh.world.is_first else lambda: None, mesh.world, CheckpointError)


def _open(folder: Path) -> tuple[ModelConfig, TensorFiles]:
    path = folder / DESCRIPTION_FILE
    description = read_json(path)
    if description.get("format") != 1 or not isinstance(description.get("files"), dict):
        raise CheckpointError(f"{path}: is not of a version that can be read here; write the weights again")
    try:
        model = ModelConfig.model_validate(description.get("model"))
    except ValidationError as error:
        raise CheckpointError(f"{path}: does not describe a model: {error}") from error
    names = sorted(set(map(str, description["files"].values())))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{path}: names files outside of its folder: {list_some(outside)}")
    return model, TensorFiles(folder, names)
