"""Disks that take no more, on one rank of several: all ranks say so, and nothing that was good is touched."""

from __future__ import annotations

import errno
import os
import resource
import threading
from pathlib import Path

import pytest

from megatron_lite.checkpoint import shards
from megatron_lite.checkpoint.tensor_files import CheckpointError
from megatron_lite.distributed.worker_pool import WorkerPool
from tests.checkpoint.pure import PureLayout, load_job, save_job, world

LAYOUT = PureLayout(tp=2, dp=2)
MANIFEST_BYTES = 50_000  # at least: larger than any of the other files


def full_disk_job(folder: Path, failing_rank: int, limit: int) -> str:
    """The disk is full for one rank, after it has written a part of its file."""
    if world().index == failing_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        return error_of(folder)
    finally:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def read_only_job(folder: Path, failing_rank: int) -> str:
    """One rank may not write: another user than root, who may everything."""
    is_root = os.geteuid() == 0
    if is_root and world().index == failing_rank:
        os.seteuid(65534)
    try:
        return error_of(folder)
    finally:
        if is_root:
            os.seteuid(0)


def error_of(folder: Path, layout: PureLayout = LAYOUT) -> str:
    try:
        save_job(layout, folder, seed=2, state={"text": "x" * MANIFEST_BYTES})
    except CheckpointError as error:
        return str(error)
    return ""


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def checkpoints(pool: WorkerPool, tmp_path: Path) -> Path:
    for step in (1, 2):
        pool.run(save_job, 4, LAYOUT, tmp_path / f"step-{step:08d}", seed=1)
    return tmp_path


# 3000 bytes are a part of a shard; 30,000 hold every shard, and not the manifest.
@pytest.mark.parametrize(("rank", "limit", "file"), [(3, 3000, "rank-00003"), (0, 30_000, "checkpoint.json")])
@pytest.mark.parametrize("step", [2, 3])
def test_a_full_disk(pool: WorkerPool, checkpoints: Path, rank: int, limit: int, file: str, step: int) -> None:
    before = content(checkpoints)
    assert 3000 < len(before["step-00000001/rank-00003.safetensors"]) < 30_000
    messages = pool.run(full_disk_job, 4, checkpoints / f"step-{step:08d}", rank, limit)
    assert len(set(messages)) == 1
    assert f"{file}" in messages[0] and "no space left to write it" in messages[0] and "free some space" in messages[0]
    assert content(checkpoints) == before
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("rank", [0, 2])
def test_a_folder_that_one_rank_may_not_write(pool: WorkerPool, checkpoints: Path, rank: int) -> None:
    before = content(checkpoints)
    if os.geteuid() != 0:
        checkpoints.chmod(0o555)
    try:
        messages = pool.run(read_only_job, 4, checkpoints / "step-00000003", rank)
    finally:
        checkpoints.chmod(0o755)
    assert len(set(messages)) == 1 and "cannot be written: Permission denied" in messages[0]
    assert "choose a folder that you may write to" in messages[0]
    assert content(checkpoints) == before
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000001", "step-00000002"]


def test_what_was_there_still_loads(pool: WorkerPool, checkpoints: Path) -> None:
    """Negative control too: without a limit the same job saves."""
    assert set(pool.run(full_disk_job, 4, checkpoints / "step-00000002", 0, 2000)) != {""}
    pool.run(load_job, 2, PureLayout(tp=2), checkpoints / "step-00000002", seed=1)
    assert set(pool.run(full_disk_job, 4, checkpoints / "step-00000002", 5, 2000)) == {""}
    pool.run(load_job, 2, PureLayout(tp=2), checkpoints / "step-00000002", seed=2)


def test_a_disk_that_fails_behind_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system tells of a write that failed once: to the thread that brings the file to the disk meanwhile."""
    calls, fsync, main = [], os.fsync, threading.get_ident()

    def fail_once(descriptor: int) -> None:
        if threading.get_ident() != main:
            calls.append(descriptor)
            if len(calls) == 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_once)
    monkeypatch.setattr(shards, "SYNC_BYTES", 1000)
    message = error_of(tmp_path / "step-00000001", PureLayout())
    assert calls, "the disk was to be busy beside the writer"
    assert "rank-00000.safetensors: cannot be written: Input/output error" in message
    assert list(tmp_path.iterdir()) == []
    assert error_of(tmp_path / "step-00000001", PureLayout()) == "", "negative control: it fails once"
