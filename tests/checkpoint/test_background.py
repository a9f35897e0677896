"""Saving in the background: the values of the moment of the call, one save at a time, errors on every rank."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lite.checkpoint import storage
from megatron_lite.checkpoint.background import BackgroundSaver
from megatron_lite.checkpoint.chunks import Chunk, GlobalTensor
from megatron_lite.checkpoint.store import load, read_manifest
from megatron_lite.checkpoint.tensor_files import CheckpointError
from megatron_lite.distributed.mesh import Axis
from megatron_lite.distributed.worker_pool import WorkerPool
from tests.checkpoint.pure import Memory, PureLayout, load_job, tiny_model, world

LAYOUT = PureLayout(tp=2, dp=2)


def second_world() -> Axis:
    own = world()
    return Axis("world", own.size, own.index, own.ranks, torch.distributed.new_group())


def one(values: torch.Tensor) -> GlobalTensor:
    return GlobalTensor("a", tuple(values.shape), values.dtype, (Chunk((0,) * values.ndim, values),))


class Gate:
    """Holds the writing of files until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.writing, self._write = threading.Event(), threading.Event(), storage.write_shard
        monkeypatch.setattr(storage, "write_shard", self._wait)

    def _wait(self, *arguments: Any) -> Any:
        self.writing.set()
        assert self.opened.wait(30)
        return self._write(*arguments)


def changing_job(folder: Path) -> None:
    """Saves twice, and destroys the values as soon as they may change."""
    saver, memory = BackgroundSaver(second_world()), Memory(LAYOUT, world().index)
    for seed in (1, 3):
        regions = [memory.filled(seed), memory.filled(seed + 1)]
        tensors = memory.to_save(regions[0]) + memory.to_save(regions[1], "adamw.first")
        saver.save(folder / f"step-{seed:08d}", tensors, state={"seed": seed}, model=tiny_model())
        saver.settle()
        for region in regions:
            region.fill_(-1)
        # what the steps communicate meanwhile has a group of its own
        total = torch.ones(1000)
        for _ in range(20):
            torch.distributed.all_reduce(total)
    saver.wait()
    assert not saver.is_busy


def test_the_values_are_those_of_the_call(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(changing_job, 4, tmp_path)
    for seed in (1, 3):
        pool.run(load_job, 2, PureLayout(dp=2), tmp_path / f"step-{seed:08d}", seed=seed)
        assert read_manifest(tmp_path / f"step-{seed:08d}").state == {"seed": seed}


def test_the_caller_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, saver, values = Gate(monkeypatch), BackgroundSaver(world()), torch.ones(5)
    called: list[bool] = []
    saver.save(
        tmp_path / "step-00000001",
        [one(values)],
        state={},
        model=tiny_model(),
        then=lambda: called.append((tmp_path / "step-00000001").is_dir()),
    )
    assert gate.writing.wait(30) and saver.is_busy and not called
    saver.settle()
    values.fill_(2)
    threading.Timer(0.2, gate.opened.set).start()
    began = time.monotonic()
    saver.save(tmp_path / "step-00000002", [one(values)], state={}, model=tiny_model())
    assert time.monotonic() - began > 0.1, "the second save waits for the first"
    assert called == [True]
    saver.wait()
    for step in (1, 2):
        target = torch.zeros(5)
        load(tmp_path / f"step-{step:08d}", [one(target)], axis=world())
        assert torch.equal(target, torch.full((5,), float(step)))


def test_without_a_snapshot_the_values_would_be_later_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the test above sees a saver that copies nothing."""
    gate, values = Gate(monkeypatch), torch.ones(5)
    monkeypatch.setattr(BackgroundSaver, "_copy", lambda self, tensors, made: tensors)
    saver = BackgroundSaver(world())
    saver.save(tmp_path / "step-00000001", [one(values)], state={}, model=tiny_model())
    assert gate.writing.wait(30)
    values.fill_(2)
    gate.opened.set()
    saver.wait()
    target = torch.zeros(5)
    load(tmp_path / "step-00000001", [one(target)], axis=world())
    assert target[0] == 2


def test_an_update_waits_for_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_copy, settled, copy, values = threading.Event(), threading.Event(), BackgroundSaver._copy, torch.ones(5)

    def held_copy(*arguments: Any) -> Any:
        assert may_copy.wait(30)
        return copy(*arguments)

    def update() -> None:
        saver.settle()
        settled.set()
        values.fill_(2)

    monkeypatch.setattr(BackgroundSaver, "_copy", held_copy)
    saver = BackgroundSaver(world())
    saver.save(tmp_path / "step-00000001", [one(values)], state={}, model=tiny_model())
    updating = threading.Thread(target=update)
    updating.start()
    assert not settled.wait(0.2), "the call has returned, and the values are still read"
    may_copy.set()
    updating.join(30)
    saver.wait()
    target = torch.zeros(5)
    load(tmp_path / "step-00000001", [one(target)], axis=world())
    assert torch.equal(target, torch.ones(5))


def test_an_update_does_not_wait_for_a_copy_that_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*arguments: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(BackgroundSaver, "_copy", fail)
    saver = BackgroundSaver(world())
    saver.save(tmp_path / "step-00000001", [one(torch.ones(5))], state={}, model=tiny_model())
    saver.settle()
    with pytest.raises(MemoryError, match="no room"):
        saver.wait()


def failing_job(folder: Path) -> list[str]:
    """What each call raised on this rank; rank 1 cannot write the first checkpoint."""
    axis, messages = world(), []
    saver, memory = BackgroundSaver(second_world()), Memory(LAYOUT, axis.index)
    original = storage.write_shard

    def fail(path: Path, chunks: Any) -> Any:
        raise OSError(28, os.strerror(28), str(path))

    def call(step: int) -> None:
        try:
            saver.save(folder / f"step-{step:08d}", memory.to_save(memory.filled(step)), state={}, model=tiny_model())
            messages.append("")
        except CheckpointError as error:
            messages.append(str(error))

    if axis.index == 1:
        storage.write_shard = fail
    call(1)
    deadline = time.monotonic() + 30
    while saver.is_busy and time.monotonic() < deadline:
        time.sleep(0.01)
    messages.append(str(saver.has_failed))
    storage.write_shard = original
    call(2)
    call(3)
    saver.wait()
    return messages


def test_an_error_is_raised_by_the_next_call_on_every_rank(pool: WorkerPool, tmp_path: Path) -> None:
    said = pool.run(failing_job, 4, tmp_path)
    assert all(one == said[0] for one in said)
    first, has_failed, second, third = said[0]
    assert (first, has_failed, third) == ("", "True", "")
    assert "No space left on device" in second and "rank-00001" in second
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"], "nothing of 1, and 2 was not begun"


def test_an_error_is_raised_once(tmp_path: Path) -> None:
    saver = BackgroundSaver(world())
    saver.save(tmp_path / "s", [one(torch.tensor([float("nan")]))], state={}, model=tiny_model())
    with pytest.raises(CheckpointError, match="not numbers"):
        saver.wait()
    saver.wait()
    assert not saver.has_failed


def test_buffers_are_used_again(tmp_path: Path) -> None:
    saver = BackgroundSaver(world())
    tensors = [one(torch.ones(1000)), GlobalTensor("b", (3,), torch.float64, (Chunk((0,), torch.ones(3).double()),))]
    saver.reserve(tensors)
    pointers = {dtype: buffer.data_ptr() for dtype, buffer in saver._buffers.items()}
    for step in (1, 2):
        saver.save(tmp_path / f"step-{step:08d}", tensors, state={}, model=tiny_model())
    saver.wait()
    assert {dtype: buffer.data_ptr() for dtype, buffer in saver._buffers.items()} == pointers
