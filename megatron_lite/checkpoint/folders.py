"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from megatron_lite.checkpoint.tensor_files import CheckpointError


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
        """Puts the folder in its place; one that was there before is removed when the new one is safe."""
        old = self.target.with_name(f".{self.target.name}.old")
        try:
            _flush(self.path)
            shutil.rmtree(old, ignore_errors=True)
            if self.target.exists():
                os.rename(self.target, old)
            os.rename(self.path, self.target)
            _flush(self.target.parent)
        except OSError as error:
            raise self._explain(error) from error
        shutil.rmtree(old, ignore_errors=True)

    def discard(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _explain(self, error: OSError) -> CheckpointError:
        reason = error.strerror or error
        return CheckpointError(f"{self.target}: cannot be written: {reason}; choose a folder that you may write to")


def refuse_occupied(folder: str | Path) -> None:
    """Raises CheckpointError where something is in the way of a new folder; an empty folder is not."""
    folder = Path(folder)
    if folder.is_dir():
        inside = sorted(path.name for path in folder.iterdir())
        if inside:
            raise CheckpointError(f"{folder}: is not empty, it has {inside[0]}; remove it, or name a new folder")
    elif folder.exists():
        raise CheckpointError(f"{folder}: is a file; name a new folder")


def _flush(folder: Path) -> None:
    """Brings the entries of a folder to the disk, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
