"""Signals to `megatron-lite train`: a checkpoint, one line that says where and how to go on, and 75 or 130."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_lite.config import RunConfig, load_config
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.train.build import layout_of
from megatron_lite.train.loop import train
from megatron_lite.utils import run_files
from tests.train.commands import TORCHRUN, Job, write_config
from tests.train.tiny_run import read_metrics, same_numbers

# (name, processes, what starts the ranks, who gets the signal, the signal); of a job of many steps.
CASES: dict[str, tuple[int, list[str] | None, str, signal.Signals]] = {
    "ctrl-c in a terminal, 2 ranks": (2, None, "all", signal.SIGINT),
    "sigterm to the launcher, 4 ranks": (4, None, "launcher", signal.SIGTERM),
    "ctrl-c five times in a terminal, 2 ranks": (2, None, "all, five times", signal.SIGINT),
    "sigterm, one process": (1, None, "launcher", signal.SIGTERM),
    "ctrl-c, one process": (1, None, "launcher", signal.SIGINT),
    "sigusr1 to the launcher, 2 ranks": (2, None, "launcher", signal.SIGUSR1),
    "sigusr1 to every process, 2 ranks": (2, None, "all", signal.SIGUSR1),
    "sigterm to every process, 2 ranks": (2, None, "all", signal.SIGTERM),
    "sigusr1, one process": (1, None, "launcher", signal.SIGUSR1),
    "sigterm to torchrun": (2, [*TORCHRUN, "--nproc-per-node", "2", "-m", "megatron_lite"], "launcher", signal.SIGTERM),
    "sigusr1 to torchrun, which is told to pass it on": (
        2,
        [*TORCHRUN, "--signals-to-handle", "SIGTERM,SIGUSR1", "--nproc-per-node", "2", "-m", "megatron_lite"],
        "launcher",
        signal.SIGUSR1,
    ),
}


def endless(tmp_path: Path, corpus: Path, nproc: int) -> Path:
    layout = ("parallel.tp=2",) if nproc > 1 else ()
    return write_config(tmp_path, corpus, "tiny", "train.num_steps=100000", "optim.decay_steps=12", *layout)


def processes(nproc: int, program: list[str] | None) -> tuple[object, ...]:
    return () if program or nproc == 1 else ("--nproc", nproc)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_stopped_run_leaves_a_checkpoint_and_goes_on(corpus: Path, tmp_path: Path, case: str) -> None:
    nproc, program, to, number = CASES[case]
    config = endless(tmp_path, corpus, nproc)
    with Job(config, *processes(nproc, program), program=program) as job:
        job.wait_for(lambda: job.num_records() >= 3)
        send: Callable[[int, int], None] = os.kill if to == "launcher" else os.killpg
        for _ in range(5 if to == "all, five times" else 1):
            send(job.process.pid, number)
            time.sleep(0.05)
        code = job.wait()
        said = job.said()
    is_person = number == signal.SIGINT
    assert code == (1 if program is not None else 130 if is_person else 75), said  # torchrun has codes of its own
    stopped = re.search(
        rf"^the run was stopped by {number.name} after step (\d+); its state is in (\S+), and the same command "
        r"\(without --overwrite\) goes on from there$",
        said,
        flags=re.MULTILINE,
    )
    assert stopped is not None and said.count("the run was stopped") == 1, said
    assert said.count(f"{number.name}: stopping; once more ends at once") == 1
    assert (f"stopped by {number.name}; all {nproc} ranks have ended" in said) == (nproc > 1 and program is None)
    assert program is not None or "Traceback" not in said
    step, checkpoint = int(stopped[1]), Path(stopped[2])
    assert checkpoint.name == f"step-{step:08d}" and (checkpoint / "checkpoint.json").is_file()
    assert job.num_records() == step
    requeue = job.metrics.parent / run_files.REQUEUE
    assert requeue.exists() != is_person
    assert is_person or requeue.read_text() == f"{number.name} {step} {checkpoint}\n"
    assert [path.name for path in job.checkpoints.iterdir()] == [checkpoint.name]

    with Job(config, *processes(nproc, program), f"train.num_steps={step + 2}", program=program) as job:
        assert job.wait() == 0, job.said()
        assert f"going on from {checkpoint}, after step {step}\n" in job.said()
    assert not requeue.exists()
    assert [record["step"] for record in read_metrics(job.metrics.parent)] == list(range(1, step + 3))


def train_undisturbed(config: RunConfig) -> None:
    train(config, mesh=build_mesh(layout_of(config), device=torch.device("cpu")))


@pytest.mark.slow
def test_a_stopped_run_of_four_ranks_has_the_numbers_of_one_that_was_left_alone(
    pool: WorkerPool, corpus: Path, tmp_path: Path
) -> None:
    more = ("parallel.tp=2", "checkpoint.interval=2", "train.num_steps=40")
    config = write_config(tmp_path, corpus, "tiny", *more)
    with Job(config, "--nproc", 4) as job:
        job.wait_for(lambda: job.num_records() >= 3)
        os.killpg(job.process.pid, signal.SIGINT)
        assert job.wait() == 130, job.said()
    with Job(config, "--nproc", 4) as job:
        assert job.wait() == 0, job.said()
    left_alone = load_config(write_config(tmp_path, corpus, "left-alone", *more), world_size=4)
    pool.run(train_undisturbed, 4, left_alone, timeout_s=120)
    assert same_numbers(job.metrics.parent, tmp_path / "runs" / "left-alone") == []


@pytest.mark.slow
def test_ranks_that_torchrun_starts_again_go_on_even_with_overwrite(
    pool: WorkerPool, corpus: Path, tmp_path: Path
) -> None:
    """Otherwise each restart would remove what the one before has done."""
    more = ("checkpoint.interval=2", "train.num_steps=40")
    config = write_config(tmp_path, corpus, "tiny", *more)
    program = [*TORCHRUN, "--nproc-per-node", "2", "--max-restarts", "1", "-m", "megatron_lite"]
    with Job(config, "--overwrite", program=program) as job:
        job.wait_for(lambda: job.num_records() >= 5)
        os.kill(rank_of_torchrun(job.process.pid, 1), signal.SIGKILL)
        assert job.wait() == 0, job.said()
        assert "going on from" in job.said()
    left_alone = load_config(write_config(tmp_path, corpus, "left-alone", *more), world_size=2)
    pool.run(train_undisturbed, 2, left_alone, timeout_s=120)
    assert same_numbers(job.metrics.parent, tmp_path / "runs" / "left-alone") == []


def rank_of_torchrun(parent: int, rank: int) -> int:
    """The process id of a rank, by the environment that torchrun gave it."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return next(
        int(child)
        for child in children
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
    )
