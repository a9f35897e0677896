"""A training run from its config to its last evaluation, and what it leaves in its folder."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
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
from megatron_lite.checkpoint.steps import step_folder
from megatron_lite.config.schema import RunConfig
from megatron_lite.data import BatchLoader, Microbatch
from megatron_lite.distributed import collectives
from megatron_lite.distributed.agreement import together
from megatron_lite.distributed.mesh import Mesh, build_mesh
from megatron_lite.distributed.rendezvous import world
from megatron_lite.models.families import parameter_table
from megatron_lite.models.flops import model_flops_per_token
from megatron_lite.models.identity import WeightSource
from megatron_lite.optim.precision import PRECISIONS
from megatron_lite.pipeline.prove import prove_run
from megatron_lite.train.build import Training, build, layout_of
from megatron_lite.train.checkpoints import Checkpointer, Position, blank_weights, restore
from megatron_lite.train.corpus import Corpus, open_corpus
from megatron_lite.train.folder import continue_folder, held_folder, prepare_folder, run_folder, write_utilisation
from megatron_lite.train.metrics import Sink, StepRecord, check_extras, open_sinks
from megatron_lite.train.progress import ConsoleSink
from megatron_lite.train.record import recorded
from megatron_lite.train.resume import Start, find_start
from megatron_lite.train.step import StepResult, evaluate, train_step
from megatron_lite.train.stop import StopSignals
from megatron_lite.train.utilisation import find_peak
from megatron_lite.utils import run_files
from megatron_lite.utils.memory import peak_memory_bytes


class RunError(ValueError):
    """A run that cannot start, the same on every rank; the message is that of the first rank that found out."""


class DivergedError(ValueError):
    """The loss or the gradient is no longer a number."""


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
        """What the process ends with: 0, or 128 and the signal's number, as shells have it."""
        return 128 + self.stopped_by if self.stopped_by else 0


def run(config: RunConfig, *, resume: str = "auto", overwrite: bool = False) -> int:
    """Joins the world that the launcher described in the environment, and trains. What every process executes.

    config: with ``parallel.dp`` filled in for that world. Returns the exit code: 0, or 130 or 143 where Ctrl-C or
    SIGTERM ended the run.
    """
    timeout_s, threads = config.train.collective_timeout_s, config.train.threads
    with world(timeout_s=timeout_s, threads=threads, device=config.run.device) as rendezvous:
        mesh = build_mesh(layout_of(config), device=rendezvous.device, timeout_s=timeout_s)
        return train(config, mesh=mesh, resume=resume, overwrite=overwrite).exit_code


def train(config: RunConfig, *, mesh: Mesh, resume: str = "auto", overwrite: bool = False) -> TrainResult:
    """Trains ``config`` on this rank's place in the mesh. Every rank calls it, and gets the same numbers.

    resume: auto goes on with the run in the folder if there is one, none begins anew, a path is gone on from
    (`megatron_lite.train.resume`). overwrite: removes what the folder holds.

    Leaves in ``run.dir/run.name``: config.yaml, metrics.jsonl, utilisation.json, checkpoints/ and what was asked for.

    Before anything else the pipeline's schedule is proven to end, and to compute everything once and in order.

    Raises RunError on every rank for a schedule that is not right, data or weights that cannot be used, a missing
    package; ResumeError for a folder that holds another run, or a checkpoint of another one; CheckpointError for one
    that cannot be read or written; DivergedError; all of them on every rank. MetricsError on the rank that writes,
    where the disk is full.
    """
    _on_first(mesh, lambda: prove_run(config))
    _refuse_other_files(config, mesh)
    with contextlib.ExitStack() as stack:
        corpus = stack.enter_context(
            contextlib.closing(together(lambda: open_corpus(config, mesh), mesh.world, RunError))
        )
        _on_first(mesh, lambda: stack.enter_context(held_folder(config)))
        start = find_start(config, mesh, resume=resume, overwrite=overwrite)
        _on_first(mesh, lambda: check_extras(config))
        if start is None:
            _on_first(mesh, lambda: prepare_folder(config))
            weights = together(lambda: initial_weights(config), mesh.world, RunError)
            return _train_steps(build(config, mesh=mesh, weights=weights), corpus, Position())
        training = build(config, mesh=mesh, weights=blank_weights(PRECISIONS[config.train.precision].master))
        position = restore(training, start.manifest)
        _on_first(mesh, lambda: _enter_folder(config, start, overwrite))
        return _train_steps(training, corpus, position)


def _refuse_other_files(config: RunConfig, mesh: Mesh) -> None:
    """Every rank reads the files that say how the pipeline goes: they are to be the same on every machine."""
    named = (config.parallel.schedule, config.parallel.partition)
    for path in (Path(name) for name in named if name.endswith((".csv", ".json"))):
        digest = together(partial(_digest, path), mesh.world, RunError)
        digests = collectives.gather_objects(digest, mesh.world)
        others = [rank for rank, other in enumerate(digests) if other != digests[0]]
        if others:
            ranks = ", ".join(map(str, others[:8])) + (" and more" if len(others) > 8 else "")
            raise RunError(f"{path}: ranks {ranks} read another file than rank 0; give every machine the same one")


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


def initial_weights(config: RunConfig) -> WeightSource | None:
    """The checkpoint of ``init.from_hf``, or None for weights drawn from the seed.

    Raises ConfigError if the checkpoint is of another model, CheckpointError if tensors are missing.
    """
    folder = config.init.from_hf
    if folder is None:
        return None
    check_matches(folder, config.model)
    dtype = PRECISIONS[config.train.precision].master
    return huggingface_weights(folder, parameter_table(config.model), config.model, dtype)


def _train_steps(training: Training, corpus: Corpus, position: Position) -> TrainResult:
    """All steps after ``position``, with their evaluations and checkpoints, or those until a signal comes."""
    config, mesh, meter = training.config, training.mesh, _Meter(training, position.tokens)
    num_steps, steps_before = config.train.num_steps, position.step
    records: list[StepRecord] = []
    with (
        StopSignals(announce=mesh.world.is_first) as signals,
        _open_sinks(training, meter, position) as sinks,
        Checkpointer(training) as checkpoints,
    ):
        while True:
            started = time.perf_counter()
            step = position.step + 1
            with recorded(training, step, step - steps_before):
                result = train_step(training, _to_device(corpus.train.batch(position.samples), mesh.device))
                seconds = time.perf_counter() - started
            # What one rank knows and all have to act on at the same step travels in one collective.
            own = (peak_memory_bytes(mesh.device), signals.requested, checkpoints.has_failed)
            peak_memory, signal_number, has_failed = largest_over_ranks(own, mesh)
            record = meter.record(step, result, seconds, peak_memory)
            _refuse_divergence(config, step, result)
            record = _evaluated(training, corpus, record)
            for sink in sinks:
                sink.write(record)
            records[1:] = [record]
            position = Position(step, position.samples + config.train.global_batch_size, record.tokens)
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
    if checkpoints.writes_any:
        where = (
            f"its state is in {step_folder(checkpoints.folder, position.step)}, and the same command (without "
            "--overwrite) goes on from there"
        )
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


def _refuse_divergence(config: RunConfig, step: int, result: StepResult) -> None:
    for name, value in (("loss", result.loss), ("gradient norm", result.grad_norm)):
        if not math.isfinite(value):
            raise DivergedError(
                f"step {step}: the {name} is {value}, at learning rate {result.lr:.3g}; lower optim.lr "
                f"({config.optim.lr:g}), lengthen optim.warmup_steps ({config.optim.warmup_steps}), or look at the "
                f"grad_norm of the steps before in {run_folder(config) / run_files.METRICS}"
            )


def _open_sinks(training: Training, meter: _Meter, position: Position) -> AbstractContextManager[Sequence[Sink]]:
    """The sinks of the run on the first rank, none on the others."""
    config, mesh = training.config, training.mesh
    if not mesh.world.is_first:
        return contextlib.nullcontext(())
    folder, console = run_folder(config), Console()
    write_utilisation(folder, meter.peak, meter.flops_per_token, mesh.world.size)
    console.print(
        f"{config.model.family}, {training.table.num_parameters / 1e6:,.1f} M weights, {config.train.precision}; "
        f"{mesh.layout} on {meter.peak.device}; {config.train.num_steps} steps of {config.tokens_per_step:,} tokens; "
        f"results in {folder}",
        highlight=False,
        soft_wrap=True,
    )
    if config.parallel.weight_stashing:
        console.print(
            "weight stashing: each stage updates its weights after every microbatch; the result depends on the number "
            "of stages, and is not that of one process",
            highlight=False,
            soft_wrap=True,
        )
    sink = ConsoleSink(config.train.num_steps, config.train.log_interval, console, position.step)
    return open_sinks(config, folder, sink, position.step)


class _Meter:
    """Makes the record of a step. Every rank has one. tokens: target tokens of the steps before."""

    def __init__(self, training: Training, tokens: int) -> None:
        self.peak = find_peak(training.mesh, training.precision.compute)
        self.flops_per_token = model_flops_per_token(training.config.model, training.config.train.seq_len)
        self._tokens = tokens

    def record(self, step: int, result: StepResult, seconds: float, peak_memory: int) -> StepRecord:
        self._tokens += result.num_target_tokens
        tokens_per_s = result.num_target_tokens / seconds
        return StepRecord(
            step=step,
            tokens=self._tokens,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=result.lr,
            loss_scale=1.0,
            step_time_s=seconds,
            tokens_per_s=tokens_per_s,
            mfu=tokens_per_s * self.flops_per_token / self.peak.total_flops_per_s,
            peak_memory_bytes=peak_memory,
        )


def largest_over_ranks(values: Sequence[int], mesh: Mesh) -> list[int]:
    """The largest of each of the values over all ranks."""
    own = torch.tensor([int(value) for value in values], device=mesh.device)
    return [int(value) for value in collectives.all_reduce(own, mesh.world, "max").tolist()]
