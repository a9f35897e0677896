"""A flat tensor in a file: read and written by threads while the caller computes, and never half-done in silence.

The space of a file is reserved when it is made, so that a full disk is found before training and not in the middle of
it. What can still go wrong on the way (a file that somebody truncates, a folder that somebody removes, a disk that
fails) is raised in the caller's thread, as an `OffloadError`, where it waits for the transfer.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from megatron_lite.utils.files import NO_SPACE

PIECE_BYTES = 4 << 20
"""What one thread reads or writes at a time: large enough that a disk is busy, small enough that all threads are."""

_RESUME = "and go on from the last checkpoint with the same command"


class OffloadError(ValueError):
    """Offloaded state that cannot be stored or read back; the message names the path, what is missing and the remedy.

    Wherever it is raised on the way of a run, the state in memory is no longer whole: only a checkpoint is.
    """


class IoThreads:
    """The threads that read and write the files of one process, without the interpreter's lock.

    before_piece: called by a thread before each piece that it moves; tests make a disk slow with it, or fail.
    """

    def __init__(self, num_threads: int = 4, before_piece: Callable[[], None] = lambda: None) -> None:
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="offload")
        self.before_piece = before_piece

    def run(self, job: Callable[[], None]) -> None:
        """Runs the job in a thread, after those that came before it have begun. It must not raise."""
        self._executor.submit(job)

    def close(self) -> None:
        """Returns when all that was begun is done; errors are with those who wait for it."""
        self._executor.shutdown(wait=True)

    def __enter__(self) -> IoThreads:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Transfer:
    """A read or a write on its way, in ``num_pieces`` that threads move."""

    def __init__(self, num_pieces: int) -> None:
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._error: Exception | None = None
        self._followers: list[Callable[[Exception | None], None]] = []
        self._num_left = num_pieces

    def wait(self) -> None:
        """Returns when the memory may be used again.

        Raises OffloadError if the transfer, or one of the same tensor before it, has failed.
        """
        self._done.wait()
        if self._error is not None:
            raise self._error

    def then(self, follower: Callable[[Exception | None], None]) -> None:
        """Calls the follower, with the error if there was one, when the transfer is done; at once if it is."""
        with self._lock:
            if not self._done.is_set():
                self._followers.append(follower)
                return
        follower(self._error)

    def end_piece(self, error: Exception | None) -> None:
        """One piece is done; with the last one the transfer is."""
        with self._lock:
            self._error = self._error or error
            self._num_left -= 1
            if self._num_left:
                return
            self._done.set()
            followers, self._followers = self._followers, []
        for follower in followers:
            follower(self._error)


class FileTensor:
    """A flat tensor of ``numel`` elements in the file ``path``, which is made, full of zeros, and must not exist yet.

    Reads and writes are of the whole tensor and keep their order. They are begun by one thread, the trainer's. After
    one has failed all later ones fail with the same error: what the file holds is not known then.

    Raises OffloadError where the file cannot be made, or the disk has no room for it.
    """

    in_place: Tensor | None = None  # no memory that one could compute on
    memory: Tensor | None = None

    def __init__(self, path: str | os.PathLike[str], numel: int, dtype: torch.dtype, *, threads: IoThreads) -> None:
        assert numel > 0, path
        self.path, self.numel, self.dtype = Path(path), numel, dtype
        self.num_bytes = numel * dtype.itemsize
        self._threads = threads
        self._last: Transfer | None = None
        self._pages: Callable[[], Tensor | None] = lambda: None  # the map, while somebody has it
        try:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.posix_fallocate(file, 0, self.num_bytes)
            except OSError:
                self.path.unlink(missing_ok=True)
                raise
            finally:
                os.close(file)
        except OSError as error:
            raise self._explain(error, "made") from error

    @property
    def file_bytes(self) -> int:
        """Of the file as it is now."""
        return self.path.stat().st_size

    def read(self, into: Tensor) -> Transfer:
        """Begins to fill ``into``, ``[numel]`` in main memory; the caller leaves it alone until it has waited."""
        return self._begin(into, writes=False)

    def write(self, source: Tensor) -> Transfer:
        """Begins to write ``source``, ``[numel]`` in main memory; the caller does not change it until it has waited."""
        return self._begin(source, writes=True)

    def mapped(self) -> Tensor:
        """The file as a tensor ``[numel]``: what one writes to it is in the file, and the next ``read`` sees it.

        Waits for transfers on their way. For checkpoints, proofs and first values: the pages count as memory of this
        process for as long as the tensor lives. Raises OffloadError; a file cut off later than this ends the process.
        """
        if self._last is not None:
            self._last.wait()
        if (pages := self._pages()) is not None:
            return pages  # one map for all who look at it at a time
        try:
            file = os.open(self.path, os.O_RDWR)
            try:
                if (size := os.fstat(file).st_size) < self.num_bytes:
                    raise self._truncated(size)
                memory = mmap.mmap(file, self.num_bytes)
            finally:
                os.close(file)
        except OSError as error:
            raise self._explain(error, "read") from error
        tensor = torch.frombuffer(memory, dtype=self.dtype, count=self.numel)
        self._pages = weakref.ref(tensor)
        return tensor

    def close(self) -> None:
        """Waits, and removes the file; a failure on the way is no longer of interest."""
        if self._last is not None:
            with suppress(Exception):
                self._last.wait()
        with suppress(OSError):
            self.path.unlink()

    def _begin(self, tensor: Tensor, *, writes: bool) -> Transfer:
        assert tensor.shape == (self.numel,) and tensor.dtype == self.dtype, (self.path, tensor.shape, tensor.dtype)
        assert tensor.device.type == "cpu" and tensor.is_contiguous(), self.path
        memory = tensor.detach().view(torch.uint8).numpy().data
        starts = range(0, self.num_bytes, PIECE_BYTES)
        transfer, before = Transfer(len(starts)), self._last
        self._last = transfer

        def start(error: Exception | None) -> None:
            for at in starts:
                if error is None:
                    self._threads.run(partial(self._move_piece, transfer, memory[at : at + PIECE_BYTES], at, writes))
                else:
                    transfer.end_piece(error)

        if before is None:
            start(None)
        else:
            before.then(start)
        return transfer

    def _move_piece(self, transfer: Transfer, piece: memoryview, at: int, writes: bool) -> None:
        """What a thread does: moves the bytes from ``at`` on, and tells the transfer."""
        try:
            self._threads.before_piece()
            # Opened anew: a model has more of these files than a process may hold open.
            file = os.open(self.path, os.O_WRONLY if writes else os.O_RDONLY)
            try:
                while piece.nbytes:
                    moved = os.pwritev(file, [piece], at) if writes else os.preadv(file, [piece], at)
                    if not moved:
                        raise self._truncated(os.fstat(file).st_size)
                    piece, at = piece[moved:], at + moved
            finally:
                os.close(file)
        except OSError as error:
            transfer.end_piece(self._explain(error, "written" if writes else "read"))
        except Exception as error:  # whatever it is, the trainer's thread has to hear of it and not to wait for ever
            transfer.end_piece(error)
        else:
            transfer.end_piece(None)

    def _truncated(self, size: int) -> OffloadError:
        return OffloadError(
            f"{self.path}: is truncated: it has {size:,} of its {self.num_bytes:,} bytes; something other than the run "
            f"changes files in offload.dir: find out what, or name another folder, {_RESUME}"
        )

    def _explain(self, error: OSError, what: str) -> OffloadError:
        if error.errno in NO_SPACE:
            free = ""
            with suppress(OSError):
                free = f", {shutil.disk_usage(self.path.parent).free:,} bytes are free there"
            return OffloadError(
                f"{self.path}: no space left for it ({error.strerror}): it needs {self.num_bytes:,} bytes{free}; free "
                "some space, raise the quota or the file-size limit, or name a folder on another disk by offload.dir, "
                f"{_RESUME}"
            )
        if error.errno == errno.ENOENT:
            gone = "it" if self.path.parent.is_dir() else f"its folder {self.path.parent}"
            return OffloadError(
                f"{self.path}: cannot be {what}: {gone} was removed while the run used it; leave the folders in "
                f"offload.dir alone while runs last, {_RESUME}"
            )
        return OffloadError(
            f"{self.path}: cannot be {what}: {error.strerror}; check the disk, or name a folder on another one by "
            f"offload.dir, {_RESUME}"
        )
