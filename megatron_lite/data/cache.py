"""Arrays that are computed from token files once, by one process, kept on disk and mapped into memory by all.

No collectives are needed: whoever comes first holds a lock while it computes and writes; the others, of this job or of
another that runs at the same time, wait for the lock and find the array there. The kernel releases the lock of a
process that is killed. Where a file system knows no locks, several may compute one array, and the last rename wins.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from megatron_lite.utils.files import AtomicFile, DataError

logger = logging.getLogger(__name__)

FOLDER = ".megatron-lite-index"  # beside the token files
MAGIC = b"MLINDEX\x01"
_PREFIX = struct.Struct("<8sQ")  # magic, bytes of the JSON that follows
_ALIGNMENT = 64  # of the values in the file
# Smaller arrays are computed faster than a file is opened and checked, and small corpora get no folder beside them.
MIN_CACHED_ENTRIES = 1 << 17
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL})


def cache_folders(folder: str | None, first_file: Path) -> tuple[Path, ...]:
    """Where arrays are kept: in `folder`, else beside the first token file, or in the user's cache where that is
    read-only."""
    if folder is not None:
        return (Path(folder),)
    beside = first_file.parent / FOLDER
    try:
        return (beside, Path.home() / ".cache/megatron-lite/index")
    except RuntimeError:  # a user without a home
        return (beside,)


def content_mark(path: Path) -> dict[str, Any]:
    """What a copy of a file has in common with it, and most other files have not: size, and a hash of its two ends."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.blake2b(file.read(1 << 16), digest_size=16)
        file.seek(max(0, size - (1 << 16)))
        digest.update(file.read())
    return {"bytes": size, "ends": digest.hexdigest()}


def fingerprint(path: Path) -> dict[str, Any]:
    """What tells a file from an earlier one of its name: its content mark, and the time of its last change."""
    return content_mark(path) | {"mtime_ns": path.stat().st_mtime_ns}


class IndexCache:
    """Keeps arrays in the first of `folders` that can be used; where none can, in memory, with a warning.

    Each file holds one array and says what it is: which array (identity), of what (version), and a checksum. A file of
    another version is stale and one that is cut or changed is damaged: both are made again.
    """

    def __init__(self, folders: Sequence[Path], min_entries: int = MIN_CACHED_ENTRIES) -> None:
        self.folders = tuple(folders)
        self.min_entries = min_entries

    def array(
        self,
        kind: str,
        identity: Mapping[str, Any],
        version: Mapping[str, Any],
        build: Callable[[], NDArray[Any]],
        *,
        entries: int,
    ) -> NDArray[Any]:
        """The array that `build` computes, mapped read-only from the cache if it is there, else computed and kept.

        kind, identity: which array; the name of its file follows from them. version: what it was computed from.
        entries: roughly how many numbers `build` has to compute; few are not worth a file.
        """
        if entries < self.min_entries or not self.folders:
            return build()
        key = json.loads(json.dumps({"kind": kind, "identity": identity, "version": version}))
        name = hashlib.blake2b(json.dumps([kind, identity], sort_keys=True).encode(), digest_size=12).hexdigest()
        obstacles = []
        for folder in self.folders:
            path = folder / f"{kind}-{name}.idx"
            found = _read(path, key)
            if found is not None:
                return found
            try:
                with _locked(folder):
                    return self._built(path, key, build)
            except _UnusableError as error:
                obstacles.append(f"{folder}: {error}")
        _warn("; ".join(obstacles))
        return build()

    def _built(self, path: Path, key: dict[str, Any], build: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """Called with the lock: what somebody else has made meanwhile, or a new file."""
        found = _read(path, key)
        if found is not None:
            return found
        for dead in path.parent.glob(
            f"{path.name}.*.tmp"
        ):  # of a process that was killed: the living wait for the lock
            dead.unlink(missing_ok=True)
        array = build()
        try:
            _write(path, key, array)
        except DataError as error:
            _warn(str(error))
            return array
        found = _read(path, key)
        return array if found is None else found


@functools.cache
def _warn(reason: str) -> None:
    """Once a process, whatever the number of arrays."""
    logger.warning("the data index is kept in memory, in each process: %s; set data.cache to a folder", reason)


class _UnusableError(Exception):
    """Nothing can be written to a folder."""


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, which is made if it is not there. Raises _UnusableError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("ab")
    except OSError as error:
        raise _UnusableError(error.strerror) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise _UnusableError(error.strerror) from error
        yield


def _read(path: Path, key: dict[str, Any]) -> NDArray[Any] | None:
    """The array in a file, mapped; None if there is no file, or one that is stale or damaged."""
    try:
        with path.open("rb") as file:
            try:
                return _mapped(file, key)
            except (ValueError, KeyError, TypeError, struct.error) as error:
                logger.warning("%s: is damaged (%s) and is made again", path, error)
    except OSError:
        pass
    return None


def _mapped(file: IO[bytes], key: dict[str, Any]) -> NDArray[Any] | None:
    magic, length = _PREFIX.unpack(file.read(_PREFIX.size))
    size = os.fstat(file.fileno()).st_size
    if magic != MAGIC or length > size:
        raise ValueError("it does not begin like an index")
    header = json.loads(file.read(length))
    if header["key"] != key:
        return None
    dtype, shape, offset = np.dtype(header["dtype"]), tuple(header["shape"]), _PREFIX.size + length
    expected = offset + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    if size != expected:
        raise ValueError(f"{size:,} bytes instead of {expected:,}")
    # The file that is open is the one that is mapped, whatever has been renamed onto its name since.
    array = np.memmap(file, dtype, "r", offset, shape).view(np.ndarray)
    if _checksum(array) != header["checksum"]:
        raise ValueError("its checksum is wrong")
    return array


def _write(path: Path, key: dict[str, Any], array: NDArray[Any]) -> None:
    array = np.ascontiguousarray(array)
    header = {"key": key, "dtype": array.dtype.str, "shape": array.shape, "checksum": _checksum(array)}
    text = json.dumps(header).encode()
    text += b" " * (-(_PREFIX.size + len(text)) % _ALIGNMENT)
    with AtomicFile(path) as file:
        file.write(_PREFIX.pack(MAGIC, len(text)) + text)
        file.write(_bytes_of(array))


def _checksum(array: NDArray[Any]) -> str:
    return hashlib.blake2b(_bytes_of(array), digest_size=16).hexdigest()


def _bytes_of(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
