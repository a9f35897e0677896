"""Signals while a run trains: every rank stops at the same step, with a checkpoint; a second one ends at once."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_lite.config import RunConfig
from megatron_lite.distributed.launch import SAME_WISH_S
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.worker_pool import WorkerError, WorkerPool
from megatron_lite.train import loop
from megatron_lite.train.build import layout_of
from megatron_lite.train.loop import TrainResult, train
from megatron_lite.train.stop import SIGNALS, Stopped, StopSignals
from megatron_lite.utils import run_files
from tests.train.tiny_run import NUM_STEPS, read_metrics, same_numbers, tiny_config


def stopped_job(config: RunConfig, number: int, step: int, rank: int) -> tuple[TrainResult, bool]:
    """A run in which one rank gets a signal while it takes a step, and whether all handlers are as they were."""
    mesh = build_mesh(layout_of(config), device=torch.device("cpu"))
    take_step, handlers = loop.train_step, [signal.getsignal(one) for one in SIGNALS]

    def signalled(training, microbatches):  # type: ignore[no-untyped-def]
        if training.num_steps + 1 == step and mesh.rank == rank:
            os.kill(os.getpid(), number)
            time.sleep(0.2)
        return take_step(training, microbatches)

    loop.train_step = signalled
    try:
        result = train(config, mesh=mesh)
    finally:
        loop.train_step = take_step
    return result, [signal.getsignal(one) for one in SIGNALS] == handlers


@pytest.mark.parametrize(
    ("number", "layout", "code"),
    [
        (signal.SIGTERM, "parallel.tp=1", 75),
        (signal.SIGINT, "parallel.tp=2", 130),
        (signal.SIGUSR1, "parallel.pp=2", 75),
    ],
)
def test_all_ranks_stop_after_the_same_step_and_the_same_command_goes_on(
    pool: WorkerPool, corpus: Path, tmp_path: Path, number: signal.Signals, layout: str, code: int
) -> None:
    config = tiny_config(corpus, tmp_path, "stopped", layout, world_size=2)
    results = pool.run(stopped_job, 2, config, number, 5, 1, timeout_s=90)
    for result, is_restored in results:
        assert (result.last.step, result.stopped_by, result.exit_code) == (5, number, code) and is_restored
    requeue = tmp_path / "stopped" / run_files.REQUEUE
    if code == 75:
        checkpoint = tmp_path / "stopped" / run_files.CHECKPOINTS / "step-00000005"
        assert requeue.read_text() == f"{number.name} 5 {checkpoint}\n"
    else:
        assert not requeue.exists(), "Ctrl-C is no wish to be started again"
    checkpoints = tmp_path / "stopped" / run_files.CHECKPOINTS
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000005"]
    assert len(read_metrics(tmp_path / "stopped")) == 5

    undisturbed = tiny_config(corpus, tmp_path, "undisturbed", layout, world_size=2)
    for one in (config, undisturbed):  # no step gets a signal
        results = pool.run(stopped_job, 2, one, number, 0, 0, timeout_s=90)
        assert all(result.stopped_by == 0 and result.last.step == NUM_STEPS for result, _ in results)
    assert same_numbers(tmp_path / "stopped", tmp_path / "undisturbed") == []


def test_without_checkpoints_a_stop_leaves_none(pool: WorkerPool, corpus: Path, tmp_path: Path) -> None:
    off = ("checkpoint.interval=0", "checkpoint.save_last=false")
    config = tiny_config(corpus, tmp_path, "off", *off)
    ((result, _),) = pool.run(stopped_job, 1, config, signal.SIGTERM, 3, 0, timeout_s=90)
    assert result.last.step == 3 and not (tmp_path / "off" / run_files.CHECKPOINTS).exists()


def test_a_signal_in_the_last_step_changes_nothing(pool: WorkerPool, corpus: Path, tmp_path: Path) -> None:
    config = tiny_config(corpus, tmp_path, "done", "train.num_steps=3", "optim.warmup_steps=1")
    ((result, _),) = pool.run(stopped_job, 1, config, signal.SIGTERM, 3, 0, timeout_s=90)
    assert (result.last.step, result.exit_code) == (3, 0)


BUSY = """
import hashlib, sys, time
from megatron_lite.train.stop import SIGNALS, Stopped, StopSignals
with StopSignals(announce=True) as signals:
    if sys.argv[1:]:
        signals.hold(float(sys.argv[1]))
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # many minutes in which no Python runs in the main thread
"""


@contextlib.contextmanager
def busy(*args: object) -> Iterator[subprocess.Popen[str]]:
    """A process whose main thread is stuck. args: the grace time in seconds, if it holds signals."""
    with subprocess.Popen(
        [sys.executable, "-c", BUSY, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def said_by(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    return process.stderr.readline()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_a_process_that_is_stuck(number: signal.Signals) -> None:
    with busy(600) as process:
        process.send_signal(number)
        assert said_by(process) == f"{number.name}: stopping; once more ends at once\n"
        process.send_signal(number)  # the launcher that passes the same Ctrl-C on
        time.sleep(SAME_WISH_S + 0.5)
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(timeout=30) == 128 + number


def test_what_a_scheduler_sends_after_sigusr1_cuts_no_checkpoint_short() -> None:
    with busy(600) as process:
        process.send_signal(signal.SIGUSR1)
        assert said_by(process).startswith("SIGUSR1: stopping")
        for number in (signal.SIGUSR1, signal.SIGTERM):
            time.sleep(SAME_WISH_S + 0.2)
            process.send_signal(number)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)  # a person's is another wish
        assert process.wait(timeout=30) == 130


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_before_the_ranks_have_met_a_signal_ends_the_process(number: signal.Signals, code: int) -> None:
    with busy() as process:
        process.send_signal(number)
        assert process.wait(timeout=30) == code
        assert said_by(process) == f"stopped by {number.name} before the first step; nothing is lost\n"


def test_the_grace_time_ends_a_process_that_cannot_stop() -> None:
    with busy(1.5) as process:
        started = time.monotonic()
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=30) == 128 + signal.SIGUSR1
        assert 1 < time.monotonic() - started < 10
        said_by(process)
        assert said_by(process) == "the run could not stop within 1.5 s; its last checkpoint stands\n"


def signalled_at_start(config: RunConfig, number: int) -> object:
    """A run whose second rank has had a signal when it begins."""
    mesh = build_mesh(layout_of(config), device=torch.device("cpu"))
    with StopSignals(announce=False) as signals:
        signals.hold(600)
        if mesh.rank == 1:
            os.kill(os.getpid(), number)
            while not signals.requested:
                time.sleep(0.01)
        with pytest.raises(Stopped) as caught:
            train(config, mesh=mesh, signals=signals)
    return caught.value.number


def test_a_signal_before_the_first_step_stops_every_rank_and_leaves_the_mark(
    pool: WorkerPool, corpus: Path, tmp_path: Path
) -> None:
    config = tiny_config(corpus, tmp_path, "early", world_size=2)
    assert pool.run(signalled_at_start, 2, config, signal.SIGUSR1, timeout_s=90) == [signal.SIGUSR1] * 2
    assert (tmp_path / "early" / run_files.REQUEUE).read_text() == "SIGUSR1 - -\n"
    assert not (tmp_path / "early" / run_files.METRICS).exists()


def test_outside_the_main_thread_nothing_is_taken_over() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def watch() -> None:
        with StopSignals(announce=False) as signals:
            seen.extend([signal.getsignal(signal.SIGTERM), signals.requested])

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert seen == [before, 0]


def lose_a_peer(number: int) -> None:
    """What happens to a rank whose launcher ends it, because another one has died."""
    signal.signal(number, signal.SIG_DFL)
    with StopSignals(announce=False) as signals:
        signals.hold(600)
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 30
        while not signals.requested and time.monotonic() < deadline:
            time.sleep(0.01)
        raise RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1234")


def test_a_rank_that_lost_a_peer_ends_by_the_signal(pool: WorkerPool) -> None:
    with pytest.raises(WorkerError, match="the process was killed by SIGTERM"):
        pool.run(lose_a_peer, 1, int(signal.SIGTERM), timeout_s=60)
