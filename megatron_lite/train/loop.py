"""A training run from its config to its last evaluation, and what it leaves in its folder."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from megatron_lite.checkpoint.huggingface import check_matches, huggingface_weights
from megatron_lite.checkpoint.steps import list_steps, step_folder
from megatron_lite.config.batch_rampup import batch_size_at
from megatron_lite.config.schema import RunConfig
from megatron_lite.data import BatchLoader, Microbatch
from megatron_lite.distributed import collectives
from megatron_lite.distributed.agreement import agreed, together
from megatron_lite.distributed.faults import lost_a_peer
from megatron_lite.distributed.mesh import Mesh, build_mesh
from megatron_lite.distributed.rank import exit_code_of
from megatron_lite.distributed.rendezvous import own_place, world
from megatron_lite.models.families import parameter_table
from megatron_lite.models.flops import model_flops_per_token
from megatron_lite.models.identity import WeightSource
from megatron_lite.optim.precision import precision_of
from megatron_lite.pipeline.prove_batches import prove_batches
from megatron_lite.train.build import Training, build, layout_of
from megatron_lite.train.checkpoints import Checkpointer, Position, blank_weights, restore
from megatron_lite.train.corpus import Corpus, open_corpus
from megatron_lite.train.diagnose import has_diverged, refuse_divergence
from megatron_lite.train.folder import (
    checkpoints_folder,
    continue_folder,
    held_folder,
    prepare_folder,
    run_folder,
    write_utilisation,
)
from megatron_lite.train.memory import account, gathering, refuse_too_large, with_gather_policy
from megatron_lite.train.metrics import Sink, StepRecord, check_extras, open_sinks
from megatron_lite.train.offload import check_room
from megatron_lite.train.progress import ConsoleSink
from megatron_lite.train.record import recorded
from megatron_lite.train.resume import Start, find_start
from megatron_lite.train.same_run import changed_settings, shared_settings
from megatron_lite.train.saved_tensors import saved_tensors_measured
from megatron_lite.train.start import start_line
from megatron_lite.train.step import StepResult, evaluate, train_step
from megatron_lite.train.stop import SIGNALS, Stopped, StopSignals, write_requeue
from megatron_lite.train.utilisation import find_peak
from megatron_lite.utils import run_files
from megatron_lite.utils.memory import peak_memory_bytes


class RunError(ValueError):
    """A run that cannot start, the same on every rank; the message is that of the first rank that found out."""


@dataclass(frozen=True)
class TrainResult:
    """folder: of the run. first, last: the records of the first and last step taken here, on every rank. stopped_by:
    the number of the signal that ended the run before its last step, or 0."""

    folder: Path
    first: StepRecord
    last: StepRecord
    stopped_by: int = 0

    @property
    def exit_code(self) -> int:
        """What the process ends with: 0, or what says that a signal has stopped it."""
        return exit_code_of(self.stopped_by) if self.stopped_by else 0


def run(config: RunConfig, *, resume: str = "auto", overwrite: bool = False, signals: StopSignals | None = None) -> int:
    """Joins the world that the launcher described in the environment, and trains. What every process executes.

    config: with ``parallel.dp`` filled in for that world. signals: those of the process, if they are taken over
    already. Returns the exit code: 0; 75 where SIGTERM or SIGUSR1, 130 where Ctrl-C ended the run.

    A launcher that starts the ranks again does so with the same arguments: what the run has done so far is not lost.
    """
    timeout_s, requeue = config.train.collective_timeout_s, run_folder(config) / run_files.REQUEUE
    with contextlib.ExitStack() as stack:
        if signals is None:
            signals = stack.enter_context(StopSignals(announce=False))
        if (place := own_place()).rank == 0:
            with contextlib.suppress(OSError):  # who cannot write there hears of it soon, with the others
                requeue.unlink(missing_ok=True)  # of the start before
            # Launchers send SIGTERM also to the ranks beside one that has failed, which is no reason to start again.
            asks = SIGNALS if place.launcher in ("", "--nproc") else (signal.SIGUSR1,)
            signals.before_exit(lambda number: write_requeue(requeue, number, None, None) if number in asks else None)
        try:
            with world(
                timeout_s=timeout_s,
                meet_timeout_s=config.run.rendezvous_timeout_s,
                threads=config.train.threads,
                device=config.run.device,
                interface=config.run.network_interface,
                settings=shared_settings(config),
            ) as rendezvous:
                signals.hold(config.run.stop_grace_s)
                if rendezvous.rank == 0:
                    print(rendezvous, flush=True)
                mesh = build_mesh(
                    layout_of(config),
                    device=rendezvous.device,
                    timeout_s=timeout_s,
                    zero_group=config.parallel.zero_group,
                )
                if rendezvous.attempt and _has_checkpoints(config, mesh):
                    resume, overwrite = "auto", False
                return train(config, mesh=mesh, resume=resume, overwrite=overwrite, signals=signals).exit_code
        except Stopped as stopped:
            return exit_code_of(stopped.number)
        except RuntimeError as error:
            if signals.requested and not signals.has_begun and lost_a_peer(str(error)):
                return exit_code_of(signals.requested)  # the other one had the signal a moment before they met
            raise


def train(
    config: RunConfig,
    *,
    mesh: Mesh,
    resume: str = "auto",
    overwrite: bool = False,
    signals: StopSignals | None = None,
) -> TrainResult:
    """Trains ``config`` on this rank's place in the mesh. Every rank calls it, and gets the same numbers.

    resume: auto goes on with the run in the folder if there is one, none begins anew, a path is gone on from
    (`megatron_lite.train.resume`). overwrite: removes what the folder holds. signals: see `run`.

    Leaves in ``run.dir/run.name``: config.yaml, metrics.jsonl, utilisation.json, checkpoints/ and what was asked for.

    Before anything else the pipeline's schedule is proven to end, and to compute everything once and in order, for
    every size that the batch is going to have; and the state of every rank is found to fit in the memory that it may
    have.

    Raises RunError on every rank for a schedule that is not right, a state that cannot fit, data or weights that cannot
    be used, a missing package; ResumeError for a folder that holds another run, or a checkpoint of another one;
    CheckpointError for one that cannot be read or written; DivergedError; LossScaleError; all of them on every rank.
    MetricsError on the rank that writes, where the disk is full. Stopped on every rank for a signal before the first
    step.
    """
    with contextlib.ExitStack() as stack:
        if signals is None:
            signals = stack.enter_context(StopSignals(announce=mesh.world.is_first))
            signals.hold(config.run.stop_grace_s)
        _on_first(mesh, lambda: prove_batches(config))
        _refuse_other_files(config, mesh)
        settled = with_gather_policy(config, mesh)
        if settled is not config:
            _on_first(mesh, lambda: prove_batches(settled))
        together(lambda: refuse_too_large(config, mesh), mesh.world, RunError)
        together(lambda: check_room(config, mesh), mesh.world, RunError)
        gathered = gathering(config, settled, mesh)
        corpus = stack.enter_context(
            contextlib.closing(together(lambda: open_corpus(config, mesh), mesh.world, RunError))
        )
        _on_first(mesh, lambda: stack.enter_context(held_folder(config)))
        start = find_start(config, mesh, resume=resume, overwrite=overwrite)
        _on_first(mesh, lambda: check_extras(config))
        _stop_early(signals, config, mesh)
        if start is None:
            _on_first(mesh, lambda: prepare_folder(config))
            weights = together(lambda: initial_weights(config), mesh.world, RunError)
        else:
            weights = blank_weights(precision_of(config.train).master)
        training = together(lambda: build(settled, mesh=mesh, weights=weights), mesh.world, RunError)
        stack.callback(training.memory.close)
        if start is None:
            return _train_steps(training, corpus, Position(), gathered, signals)
        position = restore(training, start.manifest)
        _on_first(mesh, lambda: _enter_folder(config, start, overwrite))
        return _train_steps(training, corpus, position, gathered, signals)


def _stop_early(signals: StopSignals, config: RunConfig, mesh: Mesh) -> None:
    """Raises Stopped on every rank if one of them has had a signal. What the run had saved before stands."""
    (number,) = largest_over_ranks([signals.requested], mesh)
    if number:
        if mesh.world.is_first:
            write_requeue(run_folder(config) / run_files.REQUEUE, number, None, None)
            print(str(Stopped(number)), file=sys.stderr, flush=True)
        raise Stopped(number)


def _has_checkpoints(config: RunConfig, mesh: Mesh) -> bool:
    """Whether the run has some of its own; as the first rank sees it, on every rank."""
    own = bool(list_steps(checkpoints_folder(config))) if mesh.world.is_first else False
    return bool(collectives.gather_objects(own, mesh.world)[0])


def _refuse_other_files(config: RunConfig, mesh: Mesh) -> None:
    """Every rank reads the files that say how the pipeline goes: they are to be the same on every machine."""
    named = (config.parallel.schedule, config.parallel.partition)
    for path in (Path(name) for name in named if name.endswith((".csv", ".json"))):
        digest = together(partial(_digest, path), mesh.world, RunError)
        digests = collectives.gather_objects(digest, mesh.world)
        others = [rank for rank, other in enumerate(digests) if other != digests[0]]
        if others:
            ranks = ", ".join(map(str, others[:8])) + (" and more" if len(others) > 8 else "")
            message = f"{path}: ranks {ranks} read another file than rank 0; give every machine the same one"
            raise agreed(RunError(message), mesh.world)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _on_first(mesh: Mesh, action: Callable[[], object]) -> None:
    """Runs the action on the first rank; if it fails there, every rank raises RunError."""
    together(action if mesh.world.is_first else lambda: None, mesh.world, RunError)


def _enter_folder(config: RunConfig, start: Start, overwrite: bool) -> None:
    if start.is_own:
        continue_folder(config, start.position.step, overwrite=overwrite)
    else:
        prepare_folder(config)
    print(f"going on from {start.manifest.folder}, after step {start.position.step}", flush=True)
    if changes := changed_settings(start.manifest.state.get("config", {}), config):
        print(f"changed since then: {', '.join(changes)}", flush=True)


def initial_weights(config: RunConfig) -> WeightSource | None:
    """The checkpoint of ``init.from_hf``, or None for weights drawn from the seed.

    Raises ConfigError if the checkpoint is of another model, CheckpointError if tensors are missing.
    """
    folder = config.init.from_hf
    if folder is None:
        return None
    check_matches(folder, config.model)
    dtype = precision_of(config.train).master
    return huggingface_weights(folder, parameter_table(config.model), config.model, dtype)


def _train_steps(
    training: Training, corpus: Corpus, position: Position, gathered: str, signals: StopSignals
) -> TrainResult:
    """All steps after ``position``, with their evaluations and checkpoints, or those until a signal comes."""
    config, mesh, meter = training.config, training.mesh, _Meter(training, position.tokens)
    num_steps, steps_before = config.train.num_steps, position.step
    records: list[StepRecord] = []
    _stop_early(signals, config, mesh)
    signals.has_begun = True
    with (
        _open_sinks(training, meter, position, gathered) as sinks,
        Checkpointer(training) as checkpoints,
    ):
        while True:
            started = time.perf_counter()
            step, batch_size = position.step + 1, batch_size_at(config.train, position.samples)
            number = step - steps_before
            training.set_batch_size(batch_size)
            with recorded(training, step, number), saved_tensors_measured(training, number):
                batch = _to_device(corpus.train.batch(position.samples), mesh.device)
                result = train_step(training, batch)
                seconds = time.perf_counter() - started
            # What one rank knows and all have to act on at the same step travels in one collective.
            own = (peak_memory_bytes(mesh.device), signals.requested, checkpoints.has_failed)
            peak_memory, signal_number, has_failed = largest_over_ranks(own, mesh)
            record = meter.record(step, result, seconds, peak_memory)
            if not has_diverged(training, result):
                record = _evaluated(training, corpus, record)
            for sink in sinks:
                sink.write(record)
            refuse_divergence(training, batch, step, result)  # after the record of the step, which it speaks of
            records[1:] = [record]
            position = Position(step, position.samples + batch_size, record.tokens)
            if has_failed:
                checkpoints.raise_failure()
            ends = step == num_steps or signal_number > 0
            if checkpoints.is_due(step) or (signal_number and checkpoints.writes_any):
                checkpoints.save(position, wait=ends)
            if ends:
                break
    stopped_by = 0 if position.step == num_steps else signal_number
    if stopped_by and mesh.world.is_first:
        _say_stopped(stopped_by, checkpoints, position)
    return TrainResult(run_folder(config), records[0], records[-1], stopped_by)


def _say_stopped(number: int, checkpoints: Checkpointer, position: Position) -> None:
    where = "nothing is saved, as checkpoint.interval=0 and checkpoint.save_last=false say"
    saved = step_folder(checkpoints.folder, position.step) if checkpoints.writes_any else None
    write_requeue(checkpoints.folder.parent / run_files.REQUEUE, number, position.step, saved)
    if checkpoints.writes_any:
        where = f"its state is in {saved}, and the same command (without --overwrite) goes on from there"
    name = signal.Signals(number).name
    print(f"the run was stopped by {name} after step {position.step}; {where}", file=sys.stderr, flush=True)


def _evaluated(training: Training, corpus: Corpus, record: StepRecord) -> StepRecord:
    """The record with the validation loss, where an evaluation follows its step."""
    interval, is_last = training.config.train.eval_interval, record.step == training.config.train.num_steps
    if corpus.valid is None or not (is_last or (interval and record.step % interval == 0)):
        return record
    loss = validation_loss(training, corpus.valid)
    return dataclasses.replace(record, valid_loss=loss, valid_bits_per_byte=corpus.valid_bits_per_byte(loss))


def validation_loss(training: Training, loader: BatchLoader) -> float:
    """Mean loss in nats over the targets of the first ``train.eval_batches`` global batches of the validation data."""
    batches = loader.eval_batches(training.config.train.eval_batches)
    loss, _ = evaluate(training, _to_device([one for batch in batches for one in batch], training.mesh.device))
    return loss


def _to_device(microbatches: Sequence[Microbatch], device: torch.device) -> list[Microbatch]:
    if device.type == "cpu":
        return list(microbatches)

    def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(device, non_blocking=True)

    return [
        Microbatch(b.tokens.to(device), b.targets.to(device), move(b.documents), move(b.positions))
        for b in microbatches
    ]


def _open_sinks(
    training: Training, meter: _Meter, position: Position, gathered: str
) -> AbstractContextManager[Sequence[Sink]]:
    """The sinks of the run on the first rank, none on the others. gathered: see `megatron_lite.train.start`."""
    config, mesh = training.config, training.mesh
    if not mesh.world.is_first:
        return contextlib.nullcontext(())
    folder, console = run_folder(config), Console()
    write_utilisation(folder, meter.peak, meter.flops_per_token, mesh.world.size, meter.memory.as_dict())
    console.print(start_line(training, meter.peak.device, gathered, folder), highlight=False, soft_wrap=True)
    console.print(meter.memory.table())
    if config.parallel.weight_stashing:
        console.print(
            "weight stashing: each stage updates its weights after every microbatch; the result depends on the number "
            "of stages, and is not that of one process",
            highlight=False,
            soft_wrap=True,
        )
    sink = ConsoleSink(config.train, console, position.step, position.samples)
    return open_sinks(config, folder, sink, position.step)


class _Meter:
    """Makes the record of a step. Every rank has one. tokens: target tokens of the steps before."""

    def __init__(self, training: Training, tokens: int) -> None:
        self.memory = account(training)
        self.peak = find_peak(training.mesh, training.precision.compute)
        self.flops_per_token = model_flops_per_token(training.config.model, training.config.train.seq_len)
        self._training, self._tokens = training, tokens

    def record(self, step: int, result: StepResult, seconds: float, peak_memory: int) -> StepRecord:
        self._tokens += result.num_target_tokens
        tokens_per_s = result.num_target_tokens / seconds
        scale = self._training.loss_scaler
        return StepRecord(
            step=step,
            tokens=self._tokens,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=result.lr,
            loss_scale=result.loss_scale,
            step_time_s=seconds,
            tokens_per_s=tokens_per_s,
            mfu=tokens_per_s * self.flops_per_token / self.peak.total_flops_per_s,
            peak_memory_bytes=peak_memory,
            skipped_steps=None if scale is None else scale.skipped_steps,
        )


def largest_over_ranks(values: Sequence[int], mesh: Mesh) -> list[int]:
    """The largest of each of the values over all ranks."""
    own = torch.tensor([int(value) for value in values], device=mesh.device)
    return [int(value) for value in collectives.all_reduce(own, mesh.world, "max").tolist()]
