"""A job of two processes is killed 20 times, in saves too, and ends with the numbers of one that was left alone."""

from __future__ import annotations

import os
import random
import re
import time
from pathlib import Path

import pytest
import torch

from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.checkpoint.retention import check_blocks
from megatron_lite.checkpoint.steps import list_steps, step_of
from megatron_lite.checkpoint.tensor_files import CheckpointError
from megatron_lite.config import RunConfig, load_config
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.train.build import layout_of
from megatron_lite.train.loop import train
from tests.train.commands import Job, write_config
from tests.train.tiny_run import make_corpus, read_metrics, same_numbers

NUM_KILLS, SEED = 20, 11
# A kill is due every so many steps; the last ones are taken in peace.
STEPS_A_KILL, NUM_STEPS = 6, 132
MORE = (f"train.num_steps={NUM_STEPS}", "checkpoint.interval=2", "checkpoint.keep_last=3")


def is_whole(checkpoint: Path) -> bool:
    """By its manifest and the checksums of all its bytes."""
    try:
        check_blocks(read_manifest(checkpoint))
    except CheckpointError:
        return False
    return True


def train_undisturbed(config: RunConfig) -> None:
    train(config, mesh=build_mesh(layout_of(config), device=torch.device("cpu")))


def damage(checkpoint: Path, chance: random.Random) -> None:
    """One bit of one file, or its end."""
    path = chance.choice(sorted(path for path in checkpoint.iterdir()))
    content = bytearray(path.read_bytes())
    if chance.random() < 0.5:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    else:
        del content[chance.randrange(len(content)) :]
    path.write_bytes(content)


def kill_at_a_random_moment(job: Job, number: int, chance: random.Random) -> None:
    """Some on the way to the first step, some as soon as a save is seen to begin, the others wherever it is."""
    if number % 7 == 3:
        time.sleep(chance.uniform(0, 6))
    else:
        job.wait_for(lambda: job.num_records() >= STEPS_A_KILL * number + chance.randrange(1, 4))
        if number % 2:
            job.wait_for(lambda: any(name.endswith(".partial") for name in os.listdir(job.checkpoints)))
            time.sleep(chance.uniform(0, 0.01))
        else:
            time.sleep(chance.uniform(0, 0.15))
    job.kill()


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(pool: WorkerPool, tmp_path: Path) -> None:
    corpus, chance = make_corpus(tmp_path), random.Random(SEED)
    config = write_config(tmp_path, corpus, "killed", *MORE)
    left_alone = load_config(write_config(tmp_path, corpus, "left-alone", *MORE), world_size=2)
    pool.run(train_undisturbed, 2, left_alone, timeout_s=300)

    in_saves = damaged = 0
    for number in range(NUM_KILLS + 1):
        steps = list_steps(tmp_path / "runs" / "killed" / "checkpoints")
        assert all(is_whole(path) for path in steps), "whole or not there"
        skipped: list[Path] = []
        if len(steps) > 1 and number % 5 == 4:
            skipped = [steps.pop()]
            damage(skipped[0], chance)
            damaged += not is_whole(skipped[0])
        with Job(config, "--nproc", 2, f"checkpoint.asynchronous={'true' if number % 4 < 2 else 'false'}") as job:
            if number < NUM_KILLS:
                kill_at_a_random_moment(job, number, chance)
            else:
                assert job.wait() == 0, job.said()
            said = job.said()
            in_saves += any(path.name.endswith(".partial") for path in job.checkpoints.glob(".*"))
        gone_on = re.search(r"going on from (\S+), after step (\d+)\n", said)
        if gone_on is not None:
            chosen = Path(gone_on[1])
            assert chosen == steps[-1], f"the newest that is whole:\n{said}"
            assert int(gone_on[2]) == step_of(chosen)
            assert [path.name for path in skipped if f"warning: skipped {path.name}: " not in said] == []
        for path in skipped if gone_on is None else ():  # killed before it looked
            path.rename(path.with_name(f"{path.name}.damaged"))
    assert damaged >= 3 and in_saves >= 5, (damaged, in_saves)
    assert [record["step"] for record in read_metrics(tmp_path / "runs" / "killed")] == list(range(1, NUM_STEPS + 1))
    assert same_numbers(tmp_path / "runs" / "killed", tmp_path / "runs" / "left-alone") == []
