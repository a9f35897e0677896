"""Folders that appear whole or not at all."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from megatron_lite.checkpoint.tensor_files import CheckpointError

_LEFTOVER = re.compile(r"\.(?P<target>step-\d+)\.(?P<kind>partial|old)")
# Of renameat2(2): Linux 3.15, and what its headers call them.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class PendingFolder:
    """A folder that is filled under a temporary name beside ``target``; ``publish`` renames it into place.

    As a context manager it publishes when the block ends well, and leaves nothing behind when it does not.
    """

    def __init__(self, target: str | Path) -> None:
        self.target = Path(os.path.abspath(target))
        self.path = self.target.with_name(f".{self.target.name}.partial")

    def __enter__(self) -> PendingFolder:
        self.create()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.publish()
        finally:
            self.discard()

    def create(self) -> None:
        """Makes the temporary folder; what an interrupted attempt left there is removed. Raises CheckpointError."""
        self.discard()
        try:
            self.path.mkdir(parents=True)
        except OSError as error:
            raise self._explain(error) from error

    def publish(self) -> None:
        """Puts the folder in its place; one that was there before is removed when the new one is safe.

        On Linux the two are exchanged in one step. Elsewhere there is a moment in which the old one has another name,
        and `remove_leftovers` gives it back if nothing else came.
        """
        old = self.target.with_name(f".{self.target.name}.old")
        try:
            _flush(self.path)
            if not self.target.exists():
                os.rename(self.path, self.target)
            elif not _exchange(self.path, self.target):
                remove_tree(old)
                os.rename(self.target, old)
                os.rename(self.path, self.target)
            _flush(self.target.parent)
        except OSError as error:
            raise self._explain(error) from error
        remove_tree(old)
        self.discard()

    def discard(self) -> None:
        remove_tree(self.path)

    def _explain(self, error: OSError) -> CheckpointError:
        reason = error.strerror or error
        return CheckpointError(f"{self.target}: cannot be written: {reason}; choose a folder that you may write to")


def remove_leftovers(folder: Path) -> None:
    """Removes what `PendingFolder`s of steps that were killed have left in a folder of checkpoints.

    A checkpoint that was moved aside for one that never came gets its name back. What cannot be removed stays: it is
    never taken for a checkpoint.
    """
    try:
        paths = list(folder.iterdir())
    except OSError:  # none yet, or not to be read: whoever writes there next says so
        return
    for path in paths:
        match = _LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        target = folder / match["target"]
        if match["kind"] == "old" and not target.exists():
            with suppress(OSError):
                os.rename(path, target)
        else:
            remove_tree(path)


def remove_tree(path: Path) -> None:
    """Removes a folder and what is in it, or of a link or a file its name. What cannot be removed stays."""
    with suppress(OSError):  # even looking may be forbidden
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def refuse_occupied(folder: str | Path) -> None:
    """Raises CheckpointError where something is in the way of a new folder; an empty folder is not."""
    folder = Path(folder)
    if folder.is_dir():
        inside = sorted(path.name for path in folder.iterdir())
        if inside:
            raise CheckpointError(f"{folder}: is not empty, it has {inside[0]}; remove it, or name a new folder")
    elif folder.exists():
        raise CheckpointError(f"{folder}: is a file; name a new folder")


def _exchange(one: Path, other: Path) -> bool:
    """Makes two folders change places in one step; False where the system or the file system cannot."""
    with suppress(OSError, AttributeError):
        rename = ctypes.CDLL(None, use_errno=True).renameat2
        return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)
    return False


def _flush(folder: Path) -> None:
    """Brings the entries of a folder to the disk, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
