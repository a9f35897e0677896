"""The folder of a process in ``offload.dir``: made for a run and removed after it, or by the next after a crash.

A folder belongs to a living process for as long as that holds the lock on a file in it. The kernel releases the lock
when the process ends, however it ends, so that the next run on the same host sees that the folder is nobody's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_lite.zero.files import OffloadError

SUFFIX = ".offload"
_LOCK = f"lock{SUFFIX}"


def check_offload_dir(path: str | os.PathLike[str], num_bytes: int, num_ranks: int = 1) -> None:
    """Whether the ``num_ranks`` processes of this host could put ``num_bytes`` in all into the folder ``path``.

    Raises OffloadError if it is no folder, cannot be written to, or its disk has less room than that. Folders that
    dead processes have left are removed first, since they take up room.
    """
    folder = Path(path)
    if not folder.is_dir():
        found = "is not a folder" if folder.exists() else "does not exist"
        raise OffloadError(
            f"offload.dir = {folder}: {found}; make it, on a disk of each machine's own, or name another one"
        )
    remove_stale_folders(folder)
    free, needed = shutil.disk_usage(folder).free, num_bytes
    if free < needed:
        share = f" (for {num_ranks} ranks)" if num_ranks > 1 else ""
        raise OffloadError(
            f"offload.dir = {folder}: the run needs {needed:,} bytes there{share}, {free:,} bytes are free; free "
            f"{needed - free:,} bytes, name a folder on another disk, or offload less"
        )


def remove_stale_folders(path: str | os.PathLike[str]) -> None:
    """Removes the folders in ``path`` of this host's dead processes, and of them only what runs make there.

    With the lock of ``path``, so that a folder which another process is making is not taken for one. Raises
    OffloadError if one cannot write to ``path``.
    """
    with _locked(Path(path)):
        for folder in Path(path).glob(f"{_prefix()}*"):
            try:
                lock = os.open(folder / _LOCK, os.O_RDWR)
            except OSError:
                continue  # without a lock it is not one of ours; or it is another user's
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(folder)
            except OSError:
                continue  # a living process has it
            finally:
                os.close(lock)


class OffloadFolder:
    """A folder of this process's own in ``parent``; ``close`` removes it.

    run: a name for people who look into the folder. Raises OffloadError as `check_offload_dir` does.
    """

    def __init__(self, parent: str | os.PathLike[str], *, run: str, rank: int) -> None:
        check_offload_dir(parent, num_bytes=0)
        self.parent = Path(parent)
        with _locked(self.parent), _errors_of(self.parent):
            self.path = Path(tempfile.mkdtemp(prefix=f"{_prefix()}{run}-rank{rank:05d}-", dir=self.parent))
            self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def file(self, name: str) -> Path:
        """The path of the file for a tensor of this name."""
        return self.path / f"{name}{SUFFIX}"

    def close(self) -> None:
        """Removes the files of this folder, and the folder unless somebody has put something else there."""
        if self._lock >= 0:
            _remove(self.path)
            os.close(self._lock)
            self._lock = -1


def _prefix() -> str:
    host = re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())
    return f"megatron-lite-{host}-"


def _remove(folder: Path) -> None:
    """Removes what a run makes in its folder, the lock last, and nothing else."""
    with contextlib.suppress(OSError):
        for file in folder.glob(f"*{SUFFIX}"):
            if file.name != _LOCK:
                file.unlink(missing_ok=True)
        (folder / _LOCK).unlink(missing_ok=True)
        folder.rmdir()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of ``offload.dir`` itself, and has seen that one may write there."""
    with _errors_of(folder):
        # Root may do what the mode forbids, and a disk that is mounted read-only forbids what the mode allows.
        with tempfile.TemporaryFile(dir=folder):
            pass
        lock = os.open(folder, os.O_RDONLY)
    try:
        with _errors_of(folder):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def _errors_of(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OffloadError(
            f"offload.dir = {folder}: cannot be used: {error.strerror}; name a folder that you may write to, on a disk "
            "of each machine's own"
        ) from error
