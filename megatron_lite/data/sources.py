"""The files that text comes in: which kind one is, and its bytes, decompressed as they are read."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType, TracebackType
from typing import IO, Literal, Protocol

from megatron_lite.utils.files import DataError

Kind = Literal["text", "lines", "parquet"]
_LINES, _PARQUET = (".jsonl", ".ndjson", ".json"), (".parquet", ".pq")
_COMPRESSIONS = (".gz", ".zst")
_BLOCK_BYTES = 1 << 17


class BadDocument(DataError):
    """One document that cannot be used, while those after it can."""


@dataclass(frozen=True)
class TextFile:
    """kind: "text" is one document, "lines" has one a line as JSON, "parquet" one a row. compression: gz, zst or ''."""

    path: Path
    kind: Kind
    compression: str
    disk_bytes: int
    modified_ns: int


def look_at(name: str | os.PathLike[str]) -> TextFile:
    """What a file is by its name, and how large.

    Raises:
        DataError: it is missing, a folder, or of a kind that needs a package which is not installed.
    """
    path = Path(name)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop()[1:] if suffixes and suffixes[-1] in _COMPRESSIONS else ""
    last = suffixes[-1] if suffixes else ""
    kind: Kind = "lines" if last in _LINES else "parquet" if last in _PARQUET and not compression else "text"
    try:
        if path.is_dir():
            raise DataError(f"{path}: is a folder; name the files in it, for instance {path}/*.jsonl")
        status = path.stat()
        with path.open("rb"):
            pass
    except OSError as error:
        raise unreadable(path, error) from error
    if kind == "parquet":
        needs("pyarrow.parquet", path)
    if compression == "zst":
        needs("zstandard", path)
    return TextFile(path, kind, compression, status.st_size, status.st_mtime_ns)


def needs(module: str, path: Path) -> ModuleType:
    """The module that reads `path`; DataError saying what to install if it is not there."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DataError(
            f"{path}: needs the package {package} to be read; install it with `pip install {package}` "
            "(or `pip install 'megatron-lite[data]'`)"
        ) from error


def unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read: {error.strerror}; correct the path or its permissions")


class Stream:
    """The decompressed bytes of a file from `offset` on; a context manager.

    Raises:
        DataError: from every method, for a file that cannot be read, or is damaged or cut short, with the place.
    """

    def __init__(self, file: TextFile, offset: int = 0) -> None:
        self.offset = 0
        self._of = file
        with self._explained():
            self._disk: IO[bytes] = file.path.open("rb")
            self._bytes: _Reader = _decompressed(file, self._disk)
            if not file.compression:
                self._disk.seek(offset)
                self.offset = offset
        while self.offset < offset:
            if not self.read(min(_BLOCK_BYTES, offset - self.offset)):
                raise DataError(
                    f"{file.path}: ends at byte {self.offset:,}, before it did; start anew with --overwrite"
                )

    @property
    def disk_offset(self) -> int:
        """Bytes of the file on the disk that have been read."""
        return self._disk.tell()

    def read(self, count: int) -> bytes:
        with self._explained():
            data = self._bytes.read(count)
        self.offset += len(data)
        return data

    def readline(self, limit: int) -> bytes:
        with self._explained():
            data = self._bytes.readline(limit)
        self.offset += len(data)
        return data

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._disk.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        path = self._of.path
        try:
            yield
        except (EOFError, zlib.error, gzip.BadGzipFile, _Damaged) as error:
            raise DataError(
                f"{path}: is damaged or cut short after {self.offset:,} bytes of its text ({error}); "
                "copy or download it again, then give the same command again"
            ) from error
        except OSError as error:
            raise unreadable(path, error) from error


class _Reader(Protocol):
    def read(self, count: int, /) -> bytes: ...

    def readline(self, limit: int, /) -> bytes: ...


class _Damaged(Exception):
    pass


def _decompressed(file: TextFile, disk: IO[bytes]) -> _Reader:
    if file.compression == "gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=disk), _BLOCK_BYTES)
    if file.compression == "zst":
        return io.BufferedReader(_ZstdFrames(disk, file.path), _BLOCK_BYTES)
    return disk


class _ZstdFrames(io.RawIOBase):
    """The content of all frames of a zstd file. zstandard's own reader takes a file that is cut short for whole."""

    def __init__(self, disk: IO[bytes], path: Path) -> None:
        zstandard = needs("zstandard", path)
        self._error: type[Exception] = zstandard.ZstdError
        # The windows of `zstd --long=31`, of which archives of text make use, take up to 2 GiB.
        self._make: Callable[[], _ZstdFrame] = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._frame: _ZstdFrame | None = None
        self._disk = disk
        self._packed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            self._packed = self._packed or self._disk.read(_BLOCK_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("it ends within a frame")
                return 0
            if self._frame is None:
                self._frame = self._make()
            try:
                self._ready = memoryview(self._frame.decompress(self._packed))
            except self._error as error:
                raise _Damaged(error) from error
            self._packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


class _ZstdFrame(Protocol):
    eof: bool
    unused_data: bytes

    def decompress(self, data: bytes, /) -> bytes: ...
