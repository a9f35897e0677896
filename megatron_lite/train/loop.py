"""A training run from its config to its last evaluation, and what it leaves in its folder."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from megatron_lite.checkpoint.huggingface import check_matches, huggingface_weights
from megatron_lite.checkpoint.weights import save_weights
from megatron_lite.config.schema import RunConfig
from megatron_lite.data import BatchLoader, Microbatch
from megatron_lite.distributed import collectives
from megatron_lite.distributed.agreement import together
from megatron_lite.distributed.mesh import Mesh, build_mesh
from megatron_lite.distributed.rendezvous import discover, world
from megatron_lite.models.families import parameter_table
from megatron_lite.models.identity import WeightSource
from megatron_lite.optim.precision import PRECISIONS
from megatron_lite.train.build import Training, build, layout_of
from megatron_lite.train.corpus import Corpus, open_corpus
from megatron_lite.train.folder import prepare_folder, run_folder, write_utilisation
from megatron_lite.train.metrics import Sink, StepRecord, check_extras, open_sinks
from megatron_lite.train.progress import ConsoleSink
from megatron_lite.train.step import StepResult, evaluate, train_step
from megatron_lite.train.utilisation import find_peak, model_flops_per_token
from megatron_lite.utils import run_files


class RunError(ValueError):
    """A run that cannot start, the same on every rank; the message is that of the first rank that found out."""


class DivergedError(ValueError):
    """The loss or the gradient is no longer a number."""


@dataclass(frozen=True)
class TrainResult:
    """folder: of the run. first, last: the records of its first and last step, on every rank."""

    folder: Path
    first: StepRecord
    last: StepRecord


def run(config: RunConfig, *, overwrite: bool = False) -> TrainResult:
    """Joins the world that the launcher described in the environment, and trains. What every process executes.

    config: with ``parallel.dp`` filled in for that world.
    """
    device = choose_device(config, discover(os.environ).local_world_size)
    with world(timeout_s=config.train.collective_timeout_s, threads=config.train.threads, device=device) as rendezvous:
        mesh = build_mesh(layout_of(config), device=rendezvous.device)
        return train(config, mesh=mesh, overwrite=overwrite)


def choose_device(config: RunConfig, local_world_size: int) -> Literal["cpu", "cuda"]:
    """auto: cuda where this host has a device for each of its processes."""
    if config.run.device != "auto":
        return config.run.device
    return "cuda" if torch.cuda.device_count() >= local_world_size else "cpu"


def train(config: RunConfig, *, mesh: Mesh, overwrite: bool = False) -> TrainResult:
    """Trains ``config`` on this rank's place in the mesh. Every rank calls it, and gets the same numbers.

    Leaves in ``run.dir/run.name``: config.yaml, metrics.jsonl, utilisation.json, weights/ and what was asked for.

    Raises RunError on every rank for data or weights that cannot be used, a folder that holds another run, a missing
    package; DivergedError on every rank; MetricsError on the rank that writes, where the disk is full.
    """
    corpus = together(lambda: open_corpus(config, mesh), mesh.world, RunError)
    try:
        together(lambda: _prepare(config, mesh, overwrite), mesh.world, RunError)
        weights = together(lambda: initial_weights(config), mesh.world, RunError)
        training = build(config, mesh=mesh, weights=weights)
        first, last = _train_steps(training, corpus)
        if config.run.save_weights:
            save(training, run_folder(config) / run_files.WEIGHTS)
    finally:
        corpus.close()
    return TrainResult(run_folder(config), first, last)


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


def save(training: Training, folder: Path) -> None:
    """Writes the weights of all stages. Raises CheckpointError on every rank if any of them could not."""
    save_weights(
        folder,
        training.config.model,
        mesh=training.mesh,
        table=training.table,
        names=[name for name, _ in training.stage.named_parameters()],
        master=training.engine.whole_master,
        dtype=training.precision.master,
    )


def _prepare(config: RunConfig, mesh: Mesh, overwrite: bool) -> None:
    if mesh.world.is_first:
        check_extras(config)
        prepare_folder(config, overwrite=overwrite)


def _train_steps(training: Training, corpus: Corpus) -> tuple[StepRecord, StepRecord]:
    """All steps and evaluations; the records of the first and the last step."""
    config, meter = training.config, _Meter(training)
    num_steps, interval = config.train.num_steps, config.train.eval_interval
    records: list[StepRecord] = []
    with _open_sinks(training, meter) as sinks:
        for step in range(1, num_steps + 1):
            started = time.perf_counter()
            result = train_step(training, _to_device(corpus.train.batch(step - 1), training.mesh.device))
            record = meter.record(step, result, time.perf_counter() - started)
            _refuse_divergence(config, step, result)
            if corpus.valid is not None and (step == num_steps or (interval and step % interval == 0)):
                loss = validation_loss(training, corpus.valid)
                bits = corpus.valid_bits_per_byte(loss)
                record = dataclasses.replace(record, valid_loss=loss, valid_bits_per_byte=bits)
            for sink in sinks:
                sink.write(record)
            records[1:] = [record]
    return records[0], records[-1]


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


def _open_sinks(training: Training, meter: _Meter) -> AbstractContextManager[Sequence[Sink]]:
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
    return open_sinks(config, folder, ConsoleSink(config.train.num_steps, config.train.log_interval, console))


class _Meter:
    """Makes the record of a step. Every rank has one: peak memory is the largest over ranks."""

    def __init__(self, training: Training) -> None:
        self._mesh = training.mesh
        self.peak = find_peak(training.mesh, training.precision.compute)
        self.flops_per_token = model_flops_per_token(training.config.model, training.config.train.seq_len)
        self._tokens = 0

    def record(self, step: int, result: StepResult, seconds: float) -> StepRecord:
        self._tokens += result.num_target_tokens
        tokens_per_s = result.num_target_tokens / seconds
        own = torch.tensor([peak_memory_bytes(self._mesh.device)], device=self._mesh.device)
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
            peak_memory_bytes=int(collectives.all_reduce(own, self._mesh.world, "max")),
        )


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that this process has held so far, bytes: on CUDA what torch has allocated, else what is resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
