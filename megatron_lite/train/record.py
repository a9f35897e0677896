"""Takes down one step of the pipeline, for the report."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_lite.distributed import collectives
from megatron_lite.distributed.mesh import Mesh
from megatron_lite.pipeline.timeline import Recorder, clock_offset_ns, merged, write_timeline
from megatron_lite.train.build import Training
from megatron_lite.train.folder import run_folder
from megatron_lite.utils import run_files
from megatron_lite.utils.files import DataError

ROUND_TRIPS = 8  # of which the fastest says how two clocks differ


@contextlib.contextmanager
def recorded(training: Training, step: int, number: int) -> Iterator[None]:
    """Around a step: if it is the one that ``run.record_pipeline`` names, its timeline goes to the run's folder.

    number: of the step, counted from the start or the resume of the run. Written is the pipeline of the first data-
    and tensor-parallel ranks. A record that cannot be written is no reason to end a run: a line says so.
    """
    mesh = training.mesh
    if mesh.pp.size == 1 or number != training.config.run.record_pipeline:
        yield
        return
    recorder = training.runner.recorder = _recorder(mesh.device)
    try:
        yield
    finally:
        training.runner.recorder = None
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)
    if not (mesh.dp.is_first and mesh.cp.is_first and mesh.tp.is_first):
        return
    offsets = _clock_offsets(mesh)
    records = collectives.gather_objects(recorder.record(), mesh.pp)
    if mesh.pp.is_first:
        timeline = merged(training.schedule, step, training.chunk_layers, records, offsets)
        try:
            write_timeline(run_folder(training.config) / run_files.PIPELINE, timeline)
        except DataError as error:
            print(f"the pipeline of step {step} is not recorded: {error}", file=sys.stderr, flush=True)


def _recorder(device: torch.device) -> Recorder:
    if device.type != "cuda":
        return Recorder()
    torch.cuda.synchronize(device)

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return Recorder(mark, lambda first, last: first.elapsed_time(last) / 1000)


def _clock_offsets(mesh: Mesh) -> list[int]:
    """How far each rank's clock is ahead of that of the first, nanoseconds; known to the first, elsewhere zeros."""
    pp = mesh.pp
    machines = collectives.gather_objects(_machine(), pp)
    offsets = [0] * pp.size
    for rank in range(1, pp.size):
        if machines[rank] == machines[0]:
            continue  # ranks of one machine share a clock
        if pp.is_first:
            offsets[rank] = clock_offset_ns([_ask(mesh, rank) for _ in range(ROUND_TRIPS)])
        elif pp.index == rank:
            for _ in range(ROUND_TRIPS):
                _answer(mesh)
    return offsets


def _machine() -> str:
    """The same for processes that share a clock: containers may share a name, or have several."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text() if boot.exists() else socket.gethostname()


def _ask(mesh: Mesh, rank: int) -> tuple[int, int, int]:
    """The clock here, the clock of ``rank``, the clock here."""
    question = torch.zeros(1, dtype=torch.int64, device=mesh.device)
    asked = time.perf_counter_ns()
    collectives.start_send(question, mesh.pp, rank).wait()
    answered = int(collectives.start_receive(question.clone(), mesh.pp_return, rank).wait())
    return asked, answered, time.perf_counter_ns()


def _answer(mesh: Mesh) -> None:
    question = torch.zeros(1, dtype=torch.int64, device=mesh.device)
    int(collectives.start_receive(question, mesh.pp, 0).wait())
    collectives.start_send(torch.tensor([time.perf_counter_ns()], device=mesh.device), mesh.pp_return, 0).wait()
