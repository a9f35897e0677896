"""Files that appear whole or not at all, and the error that names what a user has to do about them."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

# EFBIG is what a file-size limit (ulimit -f) gives; for the user it is the same story as a full disk.
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class DataError(ValueError):
    """A data file that cannot be read or written; the message names the file, the rule and the remedy."""


class AtomicFile:
    """A binary file written under a temporary name beside its target; `commit` renames it into place.

    Used as a context manager it commits when the block ends well and leaves nothing behind when it does not.

    Raises:
        DataError: the folder cannot be written, or the disk is full (with the bytes needed and what to do).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.num_bytes = 0
        # The process id keeps two writers of one target from sharing a temporary file.
        self._temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        self._file: IO[bytes] | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._temporary.open("wb")
        except OSError as error:
            raise self._explain(error, 0) from error

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`; on failure the temporary file is removed before the error is raised."""
        assert self._file is not None, f"{self.path} is written after it was finished"
        size = len(data) if isinstance(data, bytes) else data.nbytes
        try:
            self._file.write(data)
        except OSError as error:
            self.abort()
            raise self._explain(error, size) from error
        self.num_bytes += size

    def sync(self) -> None:
        """Bring what has been written so far to the disk. May run in a thread, beside `write`."""
        assert self._file is not None, f"{self.path} is brought to the disk after it was finished"
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._explain(error, 0) from error

    def finish(self) -> None:
        """Bring every byte to the disk and close; a full disk is found here at the latest, before any rename."""
        if self._file is None:
            return
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            self.abort()
            raise self._explain(error, 0) from error
        self._file = None

    def commit(self) -> None:
        """Finish, then rename onto the target."""
        self.finish()
        try:
            os.replace(self._temporary, self.path)
        except OSError as error:
            self.abort()
            raise self._explain(error, 0) from error

    def abort(self) -> None:
        """Close and remove the temporary file; the target, if there was one, stays as it was."""
        if self._file is not None:
            file, self._file = self._file, None
            with suppress(OSError):  # closing flushes, and on a full disk that fails once more
                file.close()
        with suppress(OSError):
            self._temporary.unlink()

    def __enter__(self) -> AtomicFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.abort()

    def _explain(self, error: OSError, size: int) -> DataError:
        if error.errno in NO_SPACE:
            with suppress(OSError):
                free = f", {shutil.disk_usage(self.path.parent).free:,} bytes are free there"
                return DataError(
                    f"{self.path}: no space left to write it ({error.strerror}): it needs at least "
                    f"{self.num_bytes + size:,} bytes{free}; free some space, raise the quota or the file-size limit, "
                    "or write to another disk; nothing half-written was kept"
                )
        return DataError(f"{self.path}: cannot be written: {error.strerror}; choose a folder that you may write to")
