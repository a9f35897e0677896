"""Arrays on disk: made once whoever asks first, never read when stale or damaged, and not needed."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lite.data import IndexCache, IndexedWriter, SampleOrder, TokenDataset, cache_folders
from megatron_lite.data import cache as cache_module
from megatron_lite.data.cache import FOLDER, fingerprint

VALUES = np.arange(1000, dtype=np.int64).reshape(100, 10)


class Builder:
    """Counts how often the array is made."""

    def __init__(self, values: np.ndarray = VALUES) -> None:
        self.values, self.calls = values, 0

    def __call__(self) -> np.ndarray:
        self.calls += 1
        return self.values.copy()


def get(folder: Path, build: Any, version: int = 1, identity: int = 1) -> np.ndarray:
    cache = IndexCache([folder], min_entries=0)
    return cache.array("test", {"identity": identity}, {"version": version}, build, entries=1)


def only_file(folder: Path) -> Path:
    (path,) = folder.glob("*.idx")
    return path


def test_an_array_is_made_once_and_mapped(tmp_path: Path) -> None:
    build = Builder()
    arrays = [get(tmp_path / "new/folder", build) for _ in range(3)]
    assert build.calls == 1
    for array in arrays:
        assert np.array_equal(array, VALUES) and array.dtype == VALUES.dtype
        assert not array.flags.writeable and array.flags.aligned
        assert isinstance(array.base, np.memmap)
    assert sorted(path.name for path in (tmp_path / "new/folder").iterdir()) == [
        "lock",
        only_file(tmp_path / "new/folder").name,
    ]
    get(tmp_path / "new/folder", build, identity=2)  # negative control: another array is another file
    assert build.calls == 2


def test_a_stale_array_is_made_again_in_its_place(tmp_path: Path) -> None:
    get(tmp_path, Builder())
    newer = Builder(VALUES + 1)
    assert np.array_equal(get(tmp_path, newer, version=2), VALUES + 1)
    assert newer.calls == 1 and len(list(tmp_path.glob("*.idx"))) == 1


@pytest.mark.parametrize("damage", ["cut", "longer", "value", "header", "empty", "magic", "half"])
def test_a_damaged_array_is_made_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    get(tmp_path, Builder())
    path = only_file(tmp_path)
    data = bytearray(path.read_bytes())
    if damage == "value":
        data[-1] ^= 1
    elif damage == "header":
        data[16:20] = b"\xff\xfe{["
    elif damage == "magic":
        data[0] ^= 1
    size = {"cut": len(data) - 1, "empty": 0, "half": 12}.get(damage, len(data))
    path.write_bytes(bytes(data[:size]) + b"x" * (damage == "longer"))
    build = Builder()
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(get(tmp_path, build), VALUES)
    assert build.calls == 1 and f"{path.name}: is damaged" in caplog.text
    get(tmp_path, build)
    assert build.calls == 1  # and it is whole again


def test_a_changed_token_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.idx"
    path.write_bytes(b"1" * 300_000)
    first = fingerprint(path)
    assert fingerprint(path) == first
    os.utime(path, ns=(0, 0))
    assert fingerprint(path) != first
    stamp = os.stat(path).st_mtime_ns
    path.write_bytes(b"1" * 299_999 + b"2")
    os.utime(path, ns=(stamp, stamp))
    assert fingerprint(path)["ends"] != first["ends"]


def test_the_places_of_documents_follow_the_file(tmp_path: Path) -> None:
    cache = IndexCache([tmp_path / "cache"], min_entries=0)
    for lengths in ([3, 5, 9], [4, 4, 9]):
        with IndexedWriter(tmp_path / "a", np.uint16) as writer:
            for length in lengths:
                writer.add_document(list(range(length)))
        for _ in range(2):
            sample = TokenDataset([tmp_path / "a"], 16, isolate_documents=True, cache=cache).sample(0)
            assert sample.document_ids is not None
            assert np.bincount(sample.document_ids).tolist() == [*lengths[:2], 8]
    assert len(list((tmp_path / "cache").glob("documents-*.idx"))) == 1


def test_an_order_is_the_same_from_the_cache(tmp_path: Path) -> None:
    cache = IndexCache([tmp_path], min_entries=0)
    plain = SampleOrder(50, seed=3)
    for _ in range(2):
        order = SampleOrder(50, seed=3, cache=cache)
        assert order.ids(0, 170).tolist() == plain.ids(0, 170).tolist()
    assert len(list(tmp_path.glob("order-*.idx"))) == 1  # one epoch after the other, in one file
    assert SampleOrder(50, seed=4, cache=cache).ids(0, 50).tolist() != plain.ids(0, 50).tolist()


def _slow_build(folder: Path) -> np.ndarray:
    with (folder / "calls").open("a") as file:
        file.write("x")
    time.sleep(0.3)
    return VALUES.copy()


def _worker(folder: Path, barrier: Any, results: Any) -> None:
    barrier.wait()
    results.put(get(folder / "cache", lambda: _slow_build(folder)).tobytes())


@pytest.mark.parametrize("locks", [True, False])
def test_processes_that_come_at_once(tmp_path: Path, locks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With locks one of them computes. Negative control: without, several do, and still each gets the array."""
    if not locks:

        def flock(*_: Any) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(cache_module.fcntl, "flock", flock)
    fork = multiprocessing.get_context("fork")
    barrier, results = fork.Barrier(4), fork.Queue()
    workers = [fork.Process(target=_worker, args=(tmp_path, barrier, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    got = [results.get(timeout=30) for _ in workers]
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    assert got == [VALUES.tobytes()] * 4
    calls = len((tmp_path / "calls").read_text())
    assert calls == 1 if locks else calls > 1
    build = Builder()
    assert np.array_equal(get(tmp_path / "cache", build), VALUES) and build.calls == 0


def test_a_process_that_is_killed_while_it_writes(tmp_path: Path) -> None:
    """The lock is free, and what was half-written is neither read nor kept."""
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()

    def build() -> np.ndarray:
        name = next(iter(tmp_path.glob("lock"))).parent / f"{path_name}.{os.getpid()}.tmp"
        name.write_bytes(b"half")
        ready.set()
        time.sleep(60)
        return VALUES

    get(tmp_path, Builder())
    path_name = only_file(tmp_path).name
    only_file(tmp_path).unlink()
    victim = fork.Process(target=get, args=(tmp_path, build))
    victim.start()
    assert ready.wait(30)
    waiting: list[np.ndarray] = []
    thread = threading.Thread(target=lambda: waiting.append(get(tmp_path, Builder())))
    thread.start()
    time.sleep(0.2)
    assert thread.is_alive()  # it waits for the one that computes
    os.kill(victim.pid or 0, signal.SIGKILL)
    victim.join(30)
    thread.join(30)
    assert np.array_equal(waiting[0], VALUES)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_folder_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    build = Builder()
    cache = IndexCache([tmp_path / "file/cache", tmp_path / "file"], min_entries=0)
    with caplog.at_level(logging.WARNING):
        for number in range(2):
            array = cache.array("test", {"number": number}, {}, build, entries=1)
            assert np.array_equal(array, VALUES) and array.flags.writeable
    assert build.calls == 2
    assert len(caplog.records) == 1 and "kept in memory" in caplog.text and "data.cache" in caplog.text
    beside = IndexCache([tmp_path / "file", tmp_path / "good"], min_entries=0)
    beside.array("test", {}, {}, build, entries=1)
    assert list((tmp_path / "good").glob("test-*.idx"))  # the next folder serves


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    build = Builder()
    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        patch.setattr("megatron_lite.utils.files.os.fsync", full)
        assert np.array_equal(get(tmp_path, build), VALUES)
    assert build.calls == 1  # it is not computed again
    assert "no space left" in caplog.text and [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_an_error_of_the_files_themselves_is_not_hidden(tmp_path: Path) -> None:
    def broken() -> np.ndarray:
        raise ValueError("the token file is broken")

    with pytest.raises(ValueError, match="token file"):
        get(tmp_path, broken)
    assert np.array_equal(get(tmp_path, Builder()), VALUES)  # and the lock is free


def test_what_is_small_is_not_kept(tmp_path: Path) -> None:
    build = Builder()
    IndexCache([tmp_path / "cache"]).array("test", {}, {}, build, entries=1000)
    assert build.calls == 1 and not (tmp_path / "cache").exists()


def test_where_arrays_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folders("given", tmp_path / "a.bin") == (Path("given"),)
    beside, home = cache_folders(None, tmp_path / "a.bin")
    assert beside == tmp_path / FOLDER and home == tmp_path / "home/.cache/megatron-lite/index"
