"""Flat tensors in files: what comes back, in which order, and what is said when a disk or a person gets in the way."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_lite.zero import files
from megatron_lite.zero.files import FileTensor, IoThreads, OffloadError
from tests.zero.disks import NUMEL, failing, run_python, sleepy, values


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of a test is of several pieces, the last one shorter."""
    monkeypatch.setattr(files, "PIECE_BYTES", 4096)


@pytest.fixture
def threads() -> Iterator[IoThreads]:
    with IoThreads() as threads:
        yield threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_written_comes_back(tmp_path: Path, threads: IoThreads, dtype: torch.dtype) -> None:
    stored = FileTensor(tmp_path / "x", NUMEL, dtype, threads=threads)
    source, into = values(dtype=dtype), torch.full((NUMEL,), 7, dtype=dtype)
    stored.read(into).wait()
    assert not into.any(), "a new one is full of zeros"
    stored.write(source).wait()
    stored.read(into).wait()
    assert torch.equal(into, source)
    assert (tmp_path / "x").stat().st_size == NUMEL * dtype.itemsize
    stored.close()
    assert not (tmp_path / "x").exists()


def test_space_is_reserved_when_the_file_is_made(tmp_path: Path, threads: IoThreads) -> None:
    FileTensor(tmp_path / "x", 1 << 18, torch.float32, threads=threads)
    with (tmp_path / "sparse").open("wb") as control:
        control.truncate(1 << 20)
    assert (tmp_path / "x").stat().st_blocks * 512 >= 1 << 20
    assert (tmp_path / "sparse").stat().st_blocks == 0, "a file system on which this shows nothing"


def test_the_map_and_the_transfers_see_the_same_bytes(tmp_path: Path, threads: IoThreads) -> None:
    stored, into = FileTensor(tmp_path / "x", NUMEL, torch.bfloat16, threads=threads), torch.empty(NUMEL).bfloat16()
    first, second = values(seed=1).bfloat16(), values(seed=2).bfloat16()
    stored.mapped().copy_(first)
    stored.read(into).wait()
    assert torch.equal(into, first)
    held = stored.mapped()
    stored.write(second).wait()
    assert torch.equal(held, second), "also in a map that is older than the write"


def test_a_map_waits_for_the_write_before_it(tmp_path: Path) -> None:
    with IoThreads(2, lambda: time.sleep(0.05)) as threads:
        stored, source = FileTensor(tmp_path / "x", NUMEL, torch.float32, threads=threads), values()
        stored.write(source)
        assert torch.equal(stored.mapped(), source)


def test_maps_do_not_stay_in_memory(tmp_path: Path, threads: IoThreads) -> None:
    def resident_file_bytes() -> int:
        status = Path("/proc/self/status").read_text()
        return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(("RssFile", "RssSh")))

    numel = 8 << 20
    stored, before = FileTensor(tmp_path / "x", numel, torch.float32, threads=threads), resident_file_bytes()
    mapped = stored.mapped()
    mapped.fill_(1)
    assert resident_file_bytes() - before > 2 * numel, "a measurement that sees no map shows nothing"
    del mapped
    # What else is mapped (parts of libraries, as they are used) is far less than the 32 MiB of the tensor.
    assert resident_file_bytes() - before < numel


@pytest.mark.parametrize("seed", range(5))
def test_reads_and_writes_of_a_tensor_keep_their_order(tmp_path: Path, seed: int) -> None:
    with IoThreads(4, sleepy(seed)) as threads:
        stored = FileTensor(tmp_path / "x", NUMEL, torch.float32, threads=threads)
        sources = [torch.full((NUMEL,), float(index)) for index in range(6)]
        buffers = [torch.empty(NUMEL) for _ in sources]
        for source, buffer in zip(sources, buffers, strict=True):
            stored.write(source)
            last = stored.read(buffer)
        last.wait()
        assert all(torch.equal(*pair) for pair in zip(sources, buffers, strict=True))


def test_without_the_order_the_delays_would_show(tmp_path: Path) -> None:
    """Negative control: transfers that do not wait for one another come back mixed up."""
    with IoThreads(4, sleepy(0)) as threads:
        stored = FileTensor(tmp_path / "x", NUMEL, torch.float32, threads=threads)
        sources = [torch.full((NUMEL,), float(index)) for index in range(6)]
        buffers = [torch.empty(NUMEL) for _ in sources]
        transfers = []
        for source, buffer in zip(sources, buffers, strict=True):
            for begin, tensor in ((stored.write, source), (stored.read, buffer)):
                transfers.append(begin(tensor))
                stored._last = None
        for transfer in transfers:
            transfer.wait()
        assert not all(torch.equal(*pair) for pair in zip(sources, buffers, strict=True))


# Faults.


def test_a_truncated_file(tmp_path: Path, threads: IoThreads) -> None:
    stored, into = FileTensor(tmp_path / "x", NUMEL, torch.float32, threads=threads), torch.empty(NUMEL)
    stored.write(values()).wait()
    os.truncate(tmp_path / "x", 5000)
    words = r"x: is truncated: it has 5,000 of its 12,000 bytes; .*last checkpoint"
    with pytest.raises(OffloadError, match=words):
        stored.mapped()  # and no SIGBUS
    reading = stored.read(into)
    for _ in range(2):
        with pytest.raises(OffloadError, match=words):
            reading.wait()
    with pytest.raises(OffloadError, match=words):
        stored.write(values()).wait()  # after a failure what the file holds is not known
    stored.close()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, r"x: no space left for it \(No space left.*needs 12,000 bytes, [\d,]+ bytes are free.*offload"),
        (errno.EDQUOT, r"x: no space left for it .*quota"),
        (errno.EIO, r"x: cannot be written: Input/output error; check the disk.*offload\.dir.*last checkpoint"),
    ],
)
def test_a_disk_that_fails_under_a_write(tmp_path: Path, code: int, words: str) -> None:
    with IoThreads() as threads:
        stored = FileTensor(tmp_path / "x", NUMEL, torch.float32, threads=threads)
        threads.before_piece = failing(code)
        with pytest.raises(OffloadError, match=words):
            stored.write(values()).wait()


def test_a_disk_that_fails_under_a_read(tmp_path: Path) -> None:
    with IoThreads() as threads:
        stored = FileTensor(tmp_path / "x", NUMEL, torch.float32, threads=threads)
        threads.before_piece = failing(errno.EIO)
        with pytest.raises(OffloadError, match="x: cannot be read: Input/output error"):
            stored.read(values()).wait()


def test_a_defect_in_a_thread_is_raised_where_it_is_waited_for(tmp_path: Path) -> None:
    def defect() -> None:
        raise ZeroDivisionError

    with IoThreads(1, defect) as threads:
        stored = FileTensor(tmp_path / "x", NUMEL, torch.float32, threads=threads)
        with pytest.raises(ZeroDivisionError):
            stored.read(values()).wait()


def test_a_device_that_is_full(threads: IoThreads, tmp_path: Path) -> None:
    """Not a pretended error: the kernel's own, from /dev/full."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    stored = FileTensor(tmp_path / "x", NUMEL, torch.float32, threads=threads)
    (tmp_path / "x").unlink()
    (tmp_path / "x").symlink_to("/dev/full")
    with pytest.raises(OffloadError, match="x: no space left for it"):
        stored.write(values()).wait()


def test_a_folder_that_is_removed(tmp_path: Path, threads: IoThreads) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    stored = FileTensor(folder / "x", NUMEL, torch.float32, threads=threads)
    shutil.rmtree(folder)
    words = "x: cannot be {}: its folder .*folder was removed while the run used it; .*last checkpoint"
    with pytest.raises(OffloadError, match=words.format("read")):
        stored.mapped()
    with pytest.raises(OffloadError, match=words.format("written")):
        stored.write(values()).wait()
    stored.close()


MAKE = """
    import sys, torch
    from megatron_lite.zero.files import FileTensor, IoThreads, OffloadError
    with IoThreads() as threads:
        for numel in (1 << 20, 1 << 16):
            try:
                FileTensor(sys.argv[1] + "/x", numel, torch.float32, threads=threads)
            except OffloadError as error:
                print(error)
            else:
                print(numel, "made")
"""


def test_a_full_disk_is_found_when_the_file_is_made(tmp_path: Path) -> None:
    """A file system of 1 MiB, in a mount namespace of its own, and a file of 4 MiB; one of 1/4 MiB finds room."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("this system lets nobody mount a file system in a namespace of his own")
    mount = ("unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs "$0" && exec "$@"', str(tmp_path))
    result = run_python(MAKE, str(tmp_path), prefix=mount)
    words = (
        "x: no space left for it (No space left on device): it needs 4,194,304 bytes, 1,048,576 bytes are free there"
    )
    assert words in result.stdout and "65536 made" in result.stdout, result.stdout + result.stderr


def test_a_limit_of_the_file_size_is_found_when_the_file_is_made(tmp_path: Path) -> None:
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({1 << 20},) * 2)"
    result = run_python(f"{limit}\n{textwrap.dedent(MAKE)}", str(tmp_path))
    assert "x: no space left for it (File too large)" in result.stdout, result.stdout + result.stderr
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [1 << 18], "of the one that fits"
