"""The walk over offloaded buckets: it changes no bit, whatever the disk does, and says so where it cannot go on."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite.zero import files
from megatron_lite.zero.files import FileTensor, IoThreads, OffloadError
from megatron_lite.zero.offload import BucketStream, HostTensor, OffloadStore, StagedTensor, StoredTensor
from tests.zero.disks import NUMEL, failing, sleepy, values

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of a test is of several pieces, the last one shorter."""
    monkeypatch.setattr(files, "PIECE_BYTES", 4096)


SIZES = {"embedding": 5000, "layers.0": 3000, "layers.1": 3000, "layers.2": 3000, "head": 700}
KINDS = ("gradient", "master", "first", "second")


def optimize(tensors: dict[str, Tensor]) -> None:
    tensors["first"].mul_(0.9).add_(tensors["gradient"], alpha=0.1)
    tensors["second"].mul_(0.99).addcmul_(tensors["gradient"], tensors["gradient"], value=0.01)
    tensors["master"].sub_(tensors["first"] / (tensors["second"].sqrt() + 1e-3))


def in_memory(names: list[str]) -> dict[str, dict[str, Tensor]]:
    return {
        name: {kind: values(SIZES[name], seed=index * 10 + len(name)) for index, kind in enumerate(KINDS)}
        for name in names
    }


def walked(store: OffloadStore, places: dict[str, str], names: list[str], num_steps: int) -> dict[str, list[Tensor]]:
    """The state after some steps whose gradients are written from outside, as an engine does."""
    stored: dict[str, dict[str, StoredTensor]] = {}
    for name, tensors in in_memory(names).items():
        stored[name] = {}
        for kind, tensor in tensors.items():
            made = store.tensor(places[kind], f"{name}.{kind}", tensor.numel(), tensor.dtype, used_on=CPU)  # type: ignore[arg-type]
            made.mapped().copy_(tensor.abs() if kind == "second" else tensor)
            stored[name][kind] = made
    stream = BucketStream(stored)
    for step in range(num_steps):
        order = names if step % 2 else names[::-1]
        for name, tensors in stream.walk(order, reads=KINDS, writes=("master", "first", "second")):
            assert {kind: tensor.numel() for kind, tensor in tensors.items()} == dict.fromkeys(KINDS, SIZES[name])
            optimize(tensors)
        for name in names:
            stored[name]["gradient"].write(values(SIZES[name], seed=step)).wait()
    result = {name: [stored[name][kind].mapped().clone() for kind in KINDS] for name in names}
    stream.close()
    return result


def expected(names: list[str], num_steps: int) -> dict[str, list[Tensor]]:
    state = in_memory(names)
    for tensors in state.values():
        tensors["second"].abs_()
    for step in range(num_steps):
        for name, tensors in state.items():
            optimize(tensors)
            tensors["gradient"].copy_(values(SIZES[name], seed=step))
    return {name: [tensors[kind] for kind in KINDS] for name, tensors in state.items()}


PLACES = {
    "files": dict.fromkeys(KINDS, "nvme"),
    "main memory": dict.fromkeys(KINDS, "cpu"),
    "both": {"gradient": "cpu", "master": "nvme", "first": "nvme", "second": "cpu"},
}


def same(one: dict[str, list[Tensor]], other: dict[str, list[Tensor]]) -> bool:
    return all(torch.equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True))


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize("num_buckets", [1, 2, 3, 5])
def test_a_walk_changes_no_bit(tmp_path: Path, places: dict[str, str], num_buckets: int) -> None:
    names = list(SIZES)[:num_buckets]
    with OffloadStore(tmp_path, run="run", rank=0, device=CPU) as store:
        assert same(walked(store, places, names, num_steps=4), expected(names, num_steps=4))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", range(5))
def test_delays_change_no_bit(tmp_path: Path, seed: int) -> None:
    threads, names = IoThreads(4, sleepy(seed)), list(SIZES)
    with OffloadStore(tmp_path, run="run", rank=0, device=CPU, threads=threads) as store:
        assert same(walked(store, PLACES["files"], names, num_steps=4), expected(names, num_steps=4))


@pytest.mark.parametrize("waits", [True, False])
def test_a_buffer_is_not_filled_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    """The first write takes long. Negative control: if the walk did not wait for it, the file would get what has come
    into the buffer meanwhile."""
    write, is_first = os.pwritev, iter([True])

    def slow_first(*arguments: Any) -> int:
        if next(is_first, False):
            time.sleep(0.5)
        return write(*arguments)

    with OffloadStore(tmp_path, run="run", rank=0, device=CPU) as store:
        stored = {name: {"master": store.tensor("nvme", name, 500, torch.float32, used_on=CPU)} for name in "abcdef"}
        for index, tensors in enumerate(stored.values()):
            tensors["master"].mapped().fill_(index)
        monkeypatch.setattr(os, "pwritev", slow_first)
        if not waits:
            monkeypatch.setattr(BucketStream, "_wait_for_set", lambda self, index: None)
        for _, tensors in BucketStream(stored).walk(list(stored), reads=["master"], writes=["master"]):
            tensors["master"].add_(10)
        found = [tensors["master"].mapped().unique().tolist() for tensors in stored.values()]
    assert (found == [[10.0 + index] for index in range(6)]) == waits


def test_the_next_is_read_and_the_last_written_while_one_is_computed_on(tmp_path: Path) -> None:
    """Counted and not timed: when the walk hands out a bucket, the next one's pieces are moved without any call."""
    moved = threading.Semaphore(0)
    threads = IoThreads(4, moved.release)
    with OffloadStore(tmp_path, run="run", rank=0, device=CPU, threads=threads) as store:
        stored = {
            name: {"master": store.tensor("nvme", name, 1024, torch.float32, used_on=CPU)} for name in ("a", "b", "c")
        }
        walk = BucketStream(stored).walk(list(stored), reads=["master"], writes=["master"])
        next(walk)
        assert all(moved.acquire(timeout=30) for _ in range(2)), "a and b are read"
        assert not moved.acquire(timeout=0.05), "but not c, for which there is no buffer free later on"
        next(walk)
        assert all(moved.acquire(timeout=30) for _ in range(2)), "a is written and c read"
        walk.close()


def test_buffers_are_three_times_the_largest_and_reused(tmp_path: Path) -> None:
    with OffloadStore(tmp_path, run="run", rank=0, device=CPU) as store:
        stored = {
            name: {
                "master": store.tensor("nvme", f"{name}.master", numel, torch.float32, used_on=CPU),
                "first": store.tensor("cpu", f"{name}.first", numel, torch.float32, used_on=CPU),
                "parameters": store.tensor("nvme", f"{name}.parameters", numel, torch.bfloat16, used_on=CPU),
            }
            for name, numel in SIZES.items()
        }
        stream = BucketStream(stored)
        assert stream.num_bytes == 3 * max(SIZES.values()) * (4 + 2), "what lies in main memory needs none"
        seen = set()
        for _ in range(3):
            for _, tensors in stream.walk(list(SIZES), reads=["master"], writes=["master"]):
                seen.add(tensors["master"].data_ptr())
        assert len(seen) == 3


def test_a_kind_that_is_filled_is_not_read(tmp_path: Path) -> None:
    with OffloadStore(tmp_path, run="run", rank=0, device=CPU) as store:
        stored = {
            name: {
                kind: store.tensor("nvme", name + kind, numel, torch.float32, used_on=CPU)
                for kind in ("master", "parameters")
            }
            for name, numel in SIZES.items()
        }
        for tensors in stored.values():
            tensors["master"].mapped().fill_(3)
            os.truncate(tensors["parameters"].path, 0)  # type: ignore[attr-defined]
        stream = BucketStream(stored)
        for _, tensors in stream.walk(list(SIZES), reads=["master"], writes=["parameters"]):
            tensors["parameters"].copy_(tensors["master"])
        assert all((one["parameters"].mapped() == 3).all() for one in stored.values())


def test_a_failure_under_a_walk_is_raised_in_it(tmp_path: Path) -> None:
    with OffloadStore(tmp_path, run="run", rank=0, device=CPU) as store:
        stored = {
            name: {"master": store.tensor("nvme", name, numel, torch.float32, used_on=CPU)}
            for name, numel in SIZES.items()
        }
        stream, seen = BucketStream(stored), []
        os.truncate(stored["layers.1"]["master"].path, 10)  # type: ignore[attr-defined]
        with pytest.raises(OffloadError, match=r"layers\.1\.offload: is truncated: it has 10 of its 12,000 bytes"):
            for name, _ in stream.walk(list(SIZES), reads=["master"], writes=["master"]):
                seen.append(name)
        assert seen == ["embedding", "layers.0"]
        stream.close()
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_behind_is_raised_later(tmp_path: Path) -> None:
    threads = IoThreads()
    with OffloadStore(tmp_path, run="run", rank=0, device=CPU, threads=threads) as store:
        stream = BucketStream({"a": {"master": store.tensor("nvme", "a", 10, torch.float32, used_on=CPU)}})
        for _ in stream.walk(["a"], reads=["master"], writes=["master"]):
            threads.before_piece = failing(errno.ENOSPC)
        with pytest.raises(OffloadError, match="no space left"):
            stream.wait()
        with pytest.raises(OffloadError, match="no space left"):
            list(stream.walk(["a"], reads=["master"], writes=["master"]))


def test_a_walk_that_is_left_early_leaves_nothing_on_its_way(tmp_path: Path) -> None:
    threads, names = IoThreads(1, lambda: time.sleep(0.005)), list(SIZES)
    with OffloadStore(tmp_path, run="run", rank=0, device=CPU, threads=threads) as store:
        stored = {
            name: {"master": store.tensor("nvme", name, numel, torch.float32, used_on=CPU)}
            for name, numel in SIZES.items()
        }
        for index, name in enumerate(names):
            stored[name]["master"].mapped().fill_(index + 1)
        stream = BucketStream(stored)
        for _ in stream.walk(names, reads=["master"], writes=[]):
            break
        found = [
            tensors["master"].unique().tolist() for _, tensors in stream.walk(names[::-1], reads=["master"], writes=[])
        ]
        assert found == [[5], [4], [3], [2], [1]]


# Main memory, and devices.


def test_on_the_cpu_main_memory_is_used_as_it_is() -> None:
    stored = HostTensor(NUMEL, torch.float32, device=CPU, pinned=False, stream=None)
    assert stored.in_place is not None and stored.in_place.data_ptr() == stored.mapped().data_ptr()
    source, into = values(), torch.empty(NUMEL)
    stored.write(source).wait()
    stored.read(into).wait()
    assert torch.equal(into, source) and torch.equal(stored.mapped(), source)


def test_a_staged_file_gives_what_it_took(tmp_path: Path) -> None:
    """As a GPU uses it, but for the pinned memory, which there is none of without one."""
    with IoThreads(4, sleepy(0)) as threads:
        stored = StagedTensor(FileTensor(tmp_path / "x", NUMEL, torch.bfloat16, threads=threads), pinned=False)
        source, into = values(dtype=torch.bfloat16), torch.empty(NUMEL, dtype=torch.bfloat16)
        kept = source.clone()
        stored.write(source)
        source.zero_()  # the copy is taken when write returns
        stored.read(into).wait()
        assert torch.equal(into, kept) and torch.equal(stored.mapped(), kept)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("place", ["cpu", "nvme"])
def test_on_a_gpu(tmp_path: Path, place: str) -> None:
    device = torch.device("cuda", 0)
    with OffloadStore(tmp_path, run="run", rank=0, device=device) as store:
        stored = store.tensor(place, "x", 1 << 20, torch.bfloat16, used_on=device)  # type: ignore[arg-type]
        buffer = torch.empty(1 << 20, dtype=torch.bfloat16, device=device)
        for round_ in range(5):
            buffer.fill_(round_)
            stored.write(buffer * 2).wait()
            assert (stored.mapped() == 2 * round_).all()
            buffer.zero_()
            stored.read(buffer).wait()
            assert (buffer == 2 * round_).all()
