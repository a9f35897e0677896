"""Where a run begins: anew, or from a checkpoint of its own or of another run, and whether it may.

``--resume auto``, the default, goes on with the run in the folder of the config, if there is one: after a kill the same
command goes on. It is strict: a config of another run is an error. ``--resume PATH`` goes on from what the path holds,
and takes changed data, seeds and constants of the model for intended. ``--resume none`` begins anew.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_lite.checkpoint.manifest import Manifest, read_manifest
from megatron_lite.checkpoint.retention import find_newest
from megatron_lite.checkpoint.tensor_files import list_some
from megatron_lite.config.schema import ModelConfig, RunConfig
from megatron_lite.distributed import collectives
from megatron_lite.distributed.agreement import together
from megatron_lite.distributed.mesh import Mesh
from megatron_lite.models.families import parameter_table
from megatron_lite.train.checkpoints import Position, position_in
from megatron_lite.train.folder import Source, choose_source, is_own_checkpoint, refuse_to_go_back, run_folder
from megatron_lite.train.same_run import changed_data, changed_keys


class ResumeError(ValueError):
    """A checkpoint that a run cannot go on from, the same on every rank; the message says why, and what to do."""


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run goes on from. is_own: it is one of the run's own folder, which then stays as it is."""

    manifest: Manifest
    position: Position
    is_own: bool


def find_start(config: RunConfig, mesh: Mesh, *, resume: str, overwrite: bool) -> Start | None:
    """What the run goes on from, or None where it begins anew. Every rank calls it; nothing is changed on the disk.

    Raises ResumeError and CheckpointError on every rank: no checkpoint is whole, or it is of another run, or the run
    has taken all its steps, or its folder holds another one.
    """
    world = mesh.world
    chosen = together(
        lambda: choose_source(config, resume, overwrite=overwrite) if world.is_first else None, world, ResumeError
    )
    source: Source | None = collectives.gather_objects(chosen, world)[0]
    if source is None:
        return None
    checkpoint: Path | None = source.folder
    if not source.is_checkpoint:
        checkpoint = find_newest(source.folder, axis=world, warn=_warn)
    if checkpoint is None:
        raise ResumeError(
            f"{source.folder}: none of its checkpoints is whole; copy one there again, name another with --resume "
            "PATH, or begin anew with --overwrite, which removes them"
        )
    warn: Callable[[str], None] = _warn if world.is_first else lambda message: None
    start = together(lambda: _open(checkpoint, config, resume, warn), world, ResumeError)
    if start.is_own and source.is_checkpoint and not overwrite:
        together(lambda: refuse_to_go_back(config, checkpoint, start.position.step), world, ResumeError)
    return start


def _open(checkpoint: Path, config: RunConfig, resume: str, warn: Callable[[str], None]) -> Start:
    manifest = read_manifest(checkpoint)
    position = position_in(manifest)
    _refuse_other_shapes(manifest, config.model)
    _refuse_other_run(manifest, config, resume, warn)
    if position.step >= config.train.num_steps:
        raise ResumeError(
            f"{run_folder(config)}: holds a run already, which has taken its {config.train.num_steps} steps; raise "
            "train.num_steps to go on with it, add --overwrite to replace it, or run.name=ANOTHER to keep it"
            if resume == "auto"
            else f"{checkpoint}: is of step {position.step}; train.num_steps = {config.train.num_steps} must be larger"
        )
    return Start(manifest, position, is_own_checkpoint(config, checkpoint))


def _refuse_other_shapes(manifest: Manifest, model: ModelConfig) -> None:
    """Raises ResumeError with the parameters and the keys that differ, unless the checkpoint's model fits this one."""
    if model.tie_embeddings and not manifest.model.tie_embeddings:
        raise ResumeError(
            f"{manifest.folder}: has a head of its own, which model.tie_embeddings=true has no place for; use "
            "model.tie_embeddings=false"
        )
    stored, wanted = ({spec.name: spec for spec in parameter_table(one)} for one in (manifest.model, model))
    problems = []
    for name in dict.fromkeys((*wanted, *stored)):
        if name not in wanted or name not in stored:
            problems.append(f"{name} is only {'there' if name in stored else 'here'}")
        elif stored[name].shape != wanted[name].shape:
            problems.append(f"{name} is {list(stored[name].shape)} there and {list(wanted[name].shape)} here")
        elif stored[name].blocks != wanted[name].blocks:
            problems.append(f"{name} has heads of another size or number")
    if problems:
        before, now = manifest.model.model_dump(), model.model_dump()
        keys = [f"model.{key} was {before[key]} and is {now[key]}" for key in now if before[key] != now[key]]
        raise ResumeError(
            f"{manifest.folder}: is a checkpoint of another model: {'; '.join(keys)}. {len(problems)} parameters "
            f"differ: {list_some(problems)}. Use the model section that it was written with, or begin anew with "
            "run.name=ANOTHER"
        )


def _refuse_other_run(manifest: Manifest, config: RunConfig, resume: str, warn: Callable[[str], None]) -> None:
    changes = changed_keys(manifest.state.get("config", {}), config) + changed_data(manifest.state.get("data"), config)
    if changes and resume == "auto":
        raise ResumeError(
            f"{manifest.folder}: is of another run: {'; '.join(changes)}. Use what it was written with, or name it "
            f"with --resume {manifest.folder} if the change is intended, or begin another run with run.name=ANOTHER"
        )
    for change in changes:
        warn(f"{manifest.folder}: {change}; the run goes on from sample {position_in(manifest).samples} of what is now")


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)
