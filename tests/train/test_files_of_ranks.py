"""Ranks on several machines read a schedule from their own disks; one with another file is told so before a step."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from megatron_lite.config import RunConfig
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.worker_pool import WorkerError, WorkerPool
from megatron_lite.pipeline.schedule_file import write_schedule
from megatron_lite.pipeline.schedules import make_schedule
from megatron_lite.train.build import layout_of
from megatron_lite.train.loop import train
from tests.train.tiny_run import tiny_config

KEYS = ("parallel.pp=2", "parallel.schedule=own.csv", "train.num_steps=1", "optim.warmup_steps=0")


def job(config: RunConfig, folders: list[Path]) -> float:
    mesh = build_mesh(layout_of(config), device=torch.device("cpu"))
    os.chdir(folders[mesh.rank])  # where the disk of this rank's machine would be
    return train(config, mesh=mesh).last.loss


def machines(folder: Path, *schedules: str) -> list[Path]:
    folders = []
    for number, schedule in enumerate(schedules):
        folders.append(folder / str(number))
        folders[-1].mkdir()
        write_schedule(make_schedule(schedule, 2, 1, 4), folders[-1] / "own.csv")
    return folders


@pytest.mark.parametrize("second", ["1f1b", "gpipe"])
def test_every_rank_has_the_same_schedule_file(
    pool: WorkerPool, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: str
) -> None:
    folders = machines(tmp_path, "1f1b", second)
    monkeypatch.chdir(folders[0])
    config = tiny_config(corpus, tmp_path, "own", *KEYS, world_size=2)
    if second == "1f1b":
        losses = pool.run(job, 2, config, folders, timeout_s=60)
        assert losses[0] == losses[1]
        return
    with pytest.raises(WorkerError, match=r"own\.csv: ranks 1 read another file than rank 0"):
        pool.run(job, 2, config, folders, timeout_s=60)
