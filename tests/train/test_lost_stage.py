"""A pipeline rank that dies in the middle of a step: the others end soon, and say what they were waiting for."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from megatron_lite.config import RunConfig
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.worker_pool import WorkerError, WorkerPool, WorkerTimeout
from megatron_lite.pipeline.instructions import Instruction, Kind
from megatron_lite.pipeline.timeline import Recorder
from megatron_lite.train import loop
from megatron_lite.train.build import Training, build, layout_of
from tests.test_cli import ranks_of
from tests.train.commands import Job, write_config
from tests.train.tiny_run import tiny_config

SHORT = ("train.num_steps=4", "optim.warmup_steps=1", "train.eval_interval=0", "run.record_pipeline=0")
LOST_IN_STEP = 2
# Far below the timeout of the runs, which is 60 s: nobody waits for a rank that is known to be dead.
SOON_S = 30


class Fatal(Recorder):
    """Ends the process in the second step, where an instruction begins."""

    def __init__(self, last: Instruction) -> None:
        super().__init__()
        self._last, self._seen = last, 0

    def begin(self, instruction: Instruction) -> None:
        super().begin(instruction)
        self._seen += instruction == self._last
        if self._seen == LOST_IN_STEP:
            die()


def die() -> None:
    """Lets the others run until they wait; then closes the connections to them, as the system does for a process that
    ends, and ends a little later: the pool ends a world as soon as it hears of a dead process, and they speak first."""
    time.sleep(SOON_S / 10)
    for entry in Path("/proc/self/fd").iterdir():
        if entry.is_symlink() and os.readlink(entry).startswith("socket:"):
            with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6) and is_connected(connection):
                    connection.shutdown(socket.SHUT_RDWR)
    time.sleep(SOON_S / 10)
    os.kill(os.getpid(), signal.SIGKILL)


def is_connected(connection: socket.socket) -> bool:
    try:
        connection.getpeername()
    except OSError:
        return False
    return True


def doomed_job(config: RunConfig, victim: int, last: Instruction) -> None:
    """Trains; the victim's run of the pipeline ends in step 2."""
    mesh = build_mesh(layout_of(config), device=torch.device("cpu"))

    def build_doomed(*args: object, **kwargs: object) -> Training:
        training = build(*args, **kwargs)  # type: ignore[arg-type]
        if mesh.pp.index == victim:
            training.runner.recorder = Fatal(last)
        return training

    loop.build = build_doomed  # type: ignore[assignment]  # the workers of a failed call are not used again
    loop.train(config, mesh=mesh)


@pytest.mark.parametrize(
    ("keys", "victim", "last", "says"),
    [
        (
            (),
            1,
            Instruction(Kind.FORWARD, 1, 2),
            r"pipeline rank 0 waited in backward of chunk 0, microbatch (\d) "
            r"to receive gradient of chunk 0, microbatch \1 from pipeline rank 1",
        ),
        (
            (),
            0,
            Instruction(Kind.BACKWARD, 0, 1),
            r"pipeline rank 1 waited in forward of chunk 1, microbatch (\d) "
            r"to receive activation of chunk 1, microbatch \1 from pipeline rank 0",
        ),
        (
            ("parallel.schedule=zb-v", "parallel.virtual_stages=2", "model.num_layers=4"),
            1,
            Instruction(Kind.BACKWARD_INPUT, 2, 1),
            r"pipeline rank 0 waited in forward of chunk 3, microbatch (\d) "
            r"to receive activation of chunk 3, microbatch \1 from pipeline rank 1",
        ),
    ],
    ids=["the last stage", "the first stage", "zb-v"],
)
def test_who_waits_for_a_dead_rank_says_for_what(
    pool: WorkerPool,
    corpus: Path,
    tmp_path: Path,
    keys: tuple[str, ...],
    victim: int,
    last: Instruction,
    says: str,
) -> None:
    config = tiny_config(corpus, tmp_path, "lost", *SHORT, "parallel.pp=2", *keys, world_size=2)
    with pytest.raises(WorkerError) as caught:
        pool.run(doomed_job, 2, config, victim, last, timeout_s=90)
    assert not isinstance(caught.value, WorkerTimeout), "it ended by itself"
    assert re.search(says, str(caught.value)), str(caught.value)
    metrics = (tmp_path / "lost" / "metrics.jsonl").read_text()
    assert metrics.count("\n") == LOST_IN_STEP - 1, "the step that it died in was not taken"


@pytest.fixture(scope="module")
def said_of_a_killed_stage(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the command says whose second stage is killed, in a step of 512 microbatches, nearly all of it pipeline."""
    folder = tmp_path_factory.mktemp("killed")
    config = write_config(folder, corpus, "tiny", *SHORT, "parallel.pp=2", "train.global_batch_size=1024")
    with Job(config, "--nproc", 2) as job:
        job.wait_for(lambda: job.num_records() > 0)
        os.kill(ranks_of(job.process.pid)[1], signal.SIGKILL)
        started = time.monotonic()
        assert job.wait() == 1
        assert time.monotonic() - started < SOON_S
        return job.said()


def test_a_stage_that_is_killed_ends_the_command(said_of_a_killed_stage: str) -> None:
    assert "rank 1 of 2 failed: the process was killed by SIGKILL" in said_of_a_killed_stage
    assert "Traceback" not in said_of_a_killed_stage


def test_the_command_says_what_the_others_were_waiting_for(said_of_a_killed_stage: str) -> None:
    waited = r"pipeline rank 0 waited in \S.* of chunk 0, microbatch \d+ to receive gradient .* from pipeline rank 1"
    assert re.search(waited, said_of_a_killed_stage)
