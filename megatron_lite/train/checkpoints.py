"""The state of a run as global tensors: what a checkpoint holds, when it is written, and how a run is given it back.

A checkpoint holds the master weights and the optimizer's state, each kind of it (``adamw.first``) under the global name
of its parameter, the number of updates, with fp16 the loss scale, and a `Position`. There is no other state: the
learning rate is a function of the step, the data that come next are a function of (seed, samples consumed), and every
random number is drawn from a counter (seed, name, index), so that the seed, the position and the number of updates are
the random state.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from megatron_lite import __version__
from megatron_lite.checkpoint.background import BackgroundSaver
from megatron_lite.checkpoint.chunks import Chunk, GlobalTensor, chunks_in_memory
from megatron_lite.checkpoint.manifest import Manifest
from megatron_lite.checkpoint.retention import prune
from megatron_lite.checkpoint.steps import step_folder
from megatron_lite.checkpoint.store import load, save
from megatron_lite.checkpoint.tensor_files import CheckpointError
from megatron_lite.config.optim import OptimConfig
from megatron_lite.distributed.faults import lost_a_peer
from megatron_lite.distributed.mesh import second_world
from megatron_lite.models.identity import ParameterSpec, WeightSource
from megatron_lite.optim.state_sizes import state_kinds
from megatron_lite.train.build import Training
from megatron_lite.train.folder import checkpoints_folder
from megatron_lite.train.same_run import data_marks, saved_config
from megatron_lite.zero.bucket import Bucket
from megatron_lite.zero.partition import Interval

WEIGHTS = "weights"  # prefix of the names of master weights; that of a kind of state has the optimizer's name in it


@dataclass(frozen=True)
class Position:
    """Where a run is. step: optimizer steps taken. samples: consumed so far. tokens: target tokens among them."""

    step: int = 0
    samples: int = 0
    tokens: int = 0


def state_of(training: Training, position: Position, data: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds beside tensors, as JSON; that of the first rank is kept. data: of `data_marks`."""
    return {
        "position": dataclasses.asdict(position),
        "loss_scale": None if training.loss_scaler is None else training.loss_scaler.state(),
        "config": saved_config(training.config),
        "data": data,
        "optimizer": {"name": training.config.optim.name, "num_steps": _num_updates(training, position)},
        "version": __version__,
    }


def _num_updates(training: Training, position: Position) -> int:
    """Updates that the optimizer made, the same for all regions; skipped steps are none."""
    return next((state.num_steps for state in training.optimizer_states.values()), position.step)


def tensors_to_save(training: Training) -> list[GlobalTensor]:
    """This rank's share of the state: all ranks together have every element once.

    Of copies that are equal (over dp at ZeRO 0, of a key-value head, of what tp does not slice) one rank has the
    element; a tied parameter is stored under the name of its owner alone.
    """
    mesh = training.mesh
    is_replica = not (mesh.cp.is_first and mesh.ep.is_first)

    def share(bucket: Bucket) -> Interval:
        return Interval(0, 0) if is_replica else bucket.share

    return _global_tensors(training, lambda spec: spec.name if spec.tied_to is None else None, share, owned_only=True)


def tensors_to_load(training: Training, stored: Collection[str]) -> list[GlobalTensor]:
    """The memory of this rank's whole state, under the names that a checkpoint has for it.

    stored: the names of its tensors. A parameter that is tied here gets the values of its owner; so does the head where
    it was tied there.
    """

    def name(spec: ParameterSpec) -> str:
        if spec.name == "head.weight" and f"{WEIGHTS}/{spec.name}" not in stored:
            return "embedding.tokens.weight"
        return spec.tied_to or spec.name

    return _global_tensors(training, name, lambda bucket: bucket.region, owned_only=False)


def _global_tensors(
    training: Training,
    name_of: Callable[[ParameterSpec], str | None],
    interval_of: Callable[[Bucket], Interval],
    *,
    owned_only: bool,
) -> list[GlobalTensor]:
    """The tensors of all parameters that have a name, with the chunks of them that lie here in an interval."""
    tp, tensors = training.mesh.tp, []
    places = {slot.name: (bucket, slot) for bucket in training.engine.updated_buckets() for slot in bucket.layout.slots}
    for spec in training.table:
        name = name_of(spec)
        if name is None:
            continue
        chunks: dict[str, list[Chunk]] = {prefix: [] for prefix in _prefixes(training.config.optim, spec)}
        if spec.name in places:
            bucket, slot = places[spec.name]
            interval = interval_of(bucket).intersect(bucket.region).intersect(slot.interval)
            for prefix, start, memory in _memories(training, bucket, interval):
                chunks[prefix] += chunks_in_memory(
                    spec,
                    tp.size,
                    tp.index,
                    memory,
                    memory_start=start,
                    shard_start=slot.start,
                    owned_only=owned_only,
                )
        for prefix, found in chunks.items():
            dtype = training.precision.master if prefix == WEIGHTS else training.precision.moments
            tensors.append(GlobalTensor(f"{prefix}/{name}", spec.shape, dtype, tuple(found)))
    return tensors


def _prefixes(optim: OptimConfig, spec: ParameterSpec) -> tuple[str, ...]:
    """What the names of a parameter's tensors begin with."""
    return WEIGHTS, *(f"{optim.name}.{kind}" for kind in state_kinds(optim, spec.name, spec.shape))


def _memories(training: Training, bucket: Bucket, interval: Interval) -> Iterator[tuple[str, int, Tensor]]:
    """(prefix, first element, flat memory) of what there is of an interval of a bucket's region."""
    part = interval.shift(-bucket.region.start)
    yield WEIGHTS, interval.start, bucket.master[part.start : part.stop]
    state = training.optimizer_states[bucket.layout.name]
    for kind in state.tensors:
        for start, memory in state.parts(kind, interval.start, interval.stop):
            yield f"{training.config.optim.name}.{kind}", start, memory


def blank_weights(dtype: torch.dtype) -> WeightSource:
    """For a model whose weights a checkpoint is about to give: zeros, as rows that only pad the vocabulary stay."""
    return lambda spec, tp, index: torch.zeros(spec.shard(tp, index).shape, dtype=dtype)


def restore(training: Training, manifest: Manifest) -> Position:
    """Gives a run that was just built the state of a checkpoint, whatever the layout of either. Every rank calls it.

    Raises CheckpointError on every rank, as `load` does, and for the state of another optimizer.
    """
    position = position_in(manifest)
    _refuse_other_optimizer(training, manifest)
    load(manifest.folder, tensors_to_load(training, manifest.tensors), axis=training.mesh.world)
    training.num_steps = position.step
    for state in training.optimizer_states.values():
        # A checkpoint that does not say it is of a program that skipped no step.
        state.num_steps = manifest.state.get("optimizer", {}).get("num_steps", position.step)
    if training.loss_scaler is not None and manifest.state.get("loss_scale"):
        training.loss_scaler.restore(manifest.state["loss_scale"])
    training.engine.round_master_weights()
    training.engine.gather_parameters()
    return position


def _refuse_other_optimizer(training: Training, manifest: Manifest) -> None:
    """Raises CheckpointError unless the checkpoint has the kinds of state that this run's optimizer keeps."""
    optim = training.config.optim
    wanted = {prefix for spec in training.table for prefix in _prefixes(optim, spec)} - {WEIGHTS}
    stored = {name.partition("/")[0] for name in manifest.tensors} - {WEIGHTS}
    if wanted == stored:
        return
    before = manifest.state.get("optimizer", {}).get("name", "adamw")
    settings = "" if before != optim.name else "; optim.momentum was " + ("above 0" if stored else "0")
    raise CheckpointError(
        f"{manifest.folder}: holds the state of optim.name={before} ({_listed(stored)}), and this run's optimizer is "
        f"{optim.name} ({_listed(wanted)}){settings}. Use the settings that it was written with, or begin another run "
        "with run.name=ANOTHER from its weights: megatron-lite convert writes them, and init.from_hf reads them"
    )


def _listed(kinds: Collection[str]) -> str:
    return ", ".join(sorted(kinds)) or "no state"


def position_in(manifest: Manifest) -> Position:
    """Where the run was. Raises CheckpointError for a checkpoint that no training wrote."""
    try:
        position = Position(**manifest.state["position"])
        if not all(type(count) is int and count >= 0 for count in dataclasses.astuple(position)):
            raise TypeError("counts are integers from 0")
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{manifest.folder}: holds weights, and not where a run was, so that none can go on from it; begin with "
            "--resume none"
        ) from error
    return position


class Checkpointer:
    """Writes the state of a run as its config says. Every rank has one, and calls the same methods at the same steps.

    As a context manager it lets a checkpoint that is being written come to its end, also when the run failed, unless
    other ranks are gone, without which it would never end.
    """

    def __init__(self, training: Training) -> None:
        self._training, self._settings = training, training.config.checkpoint
        self.folder = checkpoints_folder(training.config)
        # Of the files that are open now: what replaces them on the disk later is not what this run reads.
        self._data = data_marks(training.config) if training.mesh.world.is_first else {}
        self._saver: BackgroundSaver | None = None
        # What lies in files may be more than main memory has room for a copy of: it is written while the steps wait.
        if self._settings.asynchronous and self._settings.interval and not training.memory.uses_files:
            self._saver = BackgroundSaver(second_world(training.mesh))
            training.before_update = self._saver.settle
            if self._settings.interval < training.config.train.num_steps:
                self._saver.reserve(tensors_to_save(training))

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._saver is not None and not lost_a_peer(str(error)):
            with contextlib.suppress(Exception) if error is not None else contextlib.nullcontext():
                self._saver.wait()

    @property
    def writes_any(self) -> bool:
        """Whether the config asks for any checkpoints."""
        return self._settings.interval > 0 or self._settings.save_last

    @property
    def has_failed(self) -> bool:
        """Whether a checkpoint could not be written in the background; ``raise_failure`` says why."""
        return self._saver is not None and self._saver.has_failed

    def raise_failure(self) -> None:
        """Raises CheckpointError if a checkpoint could not be written. Every rank calls it when one has failed."""
        if self._saver is not None:
            self._saver.wait()

    def is_due(self, step: int) -> bool:
        is_last = step == self._training.config.train.num_steps
        interval = self._settings.interval
        return bool(interval and step % interval == 0) or (is_last and self._settings.save_last)

    def save(self, position: Position, *, wait: bool) -> Path:
        """Writes the state, or with ``wait=False`` has it written in the background; returns the checkpoint's folder.

        Raises CheckpointError on every rank if it, or the one before, cannot be written; older ones are as they were.
        """
        training, axis = self._training, self._training.mesh.world
        folder = step_folder(self.folder, position.step)
        tensors, state = tensors_to_save(training), state_of(training, position, self._data)
        if self._saver is not None and not wait:
            self._saver.save(
                folder, tensors, state=state, model=training.config.model, then=lambda: self._prune(folder)
            )
            return folder
        self.raise_failure()
        save(folder, tensors, state=state, model=training.config.model, axis=axis)
        if axis.is_first:
            self._prune(folder)
        return folder

    def _prune(self, newest: Path) -> None:
        keep_last, keep_every = self._settings.keep_last, self._settings.keep_every
        prune(self.folder, keep_last=keep_last, keep_every=keep_every, newest=newest)
