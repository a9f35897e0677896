"""The files of a checkpoint: safetensors, with a checksum for each block, written and read a block at a time.

A reader checks every block that it touches before it uses a byte of it, so that what is damaged is never taken for a
weight, and what is not needed is not read. CRC-32 runs at the speed of memory (some 4 GB/s), finds every error of up
to 32 bits in a row, and misses one in four billion of the others: it guards against disks, not against forgers.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from megatron_lite.checkpoint.chunks import Box, Chunk, flat_boxes
from megatron_lite.checkpoint.manifest import BLOCK_BYTES, Manifest, StoredChunk, StoredFile
from megatron_lite.checkpoint.tensor_files import CheckpointError, PlannedTensor, as_bytes, safetensors_header
from megatron_lite.utils.files import AtomicFile

SYNC_BYTES = 32 << 20  # what is written meanwhile is brought to the disk in steps of this size


def write_shard(path: Path, chunks: Sequence[tuple[str, Chunk]]) -> tuple[StoredFile, list[int]]:
    """Writes chunks, each with the name of its tensor, as one safetensors file; on the disk when this returns.

    Inside, a chunk is called ``<tensor>@<offsets>``. The widest dtype comes first, so that every chunk is aligned.

    Returns the file's size and checksums, and the byte at which each chunk begins, in the order given.

    Raises CheckpointError for values that are not numbers, DataError where the disk is full or refuses; the file is
    then not there.
    """
    order = sorted(range(len(chunks)), key=lambda i: -chunks[i][1].values.dtype.itemsize)
    plan = [
        PlannedTensor(f"{name}@{','.join(map(str, chunk.offsets))}", chunk.sizes, chunk.values.dtype)
        for name, chunk in (chunks[i] for i in order)
    ]
    starts = [0] * len(chunks)
    with AtomicFile(path) as file, _SyncBehind(file) as behind:
        checksums = _Checksums()
        for part in checksums.add(memoryview(safetensors_header(plan, {"format": "pt"}))):
            file.write(part)
        for i in order:
            name, chunk = chunks[i]
            values = chunk.values.detach().cpu()
            if not is_finite(values):
                raise CheckpointError(
                    f"{path.parent}: {name} holds values that are not numbers (NaN or infinity), so this would not be "
                    "a good checkpoint: nothing was written; go on from the last one, with a lower optim.lr"
                )
            starts[i] = file.num_bytes
            for part in checksums.add(as_bytes(values)):
                file.write(part)
                behind.follow()
        return StoredFile(bytes=file.num_bytes, checksums=tuple(checksums.finish())), starts


class _SyncBehind:
    """Brings a file to the disk while it is still being written, so that the disk does not wait for the checksums."""

    def __init__(self, file: AtomicFile) -> None:
        self._file, self._synced = file, 0
        self._thread = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None

    def follow(self) -> None:
        """Starts to bring what has been written to the disk, if it is much and the thread is idle."""
        if self._file.num_bytes - self._synced < SYNC_BYTES or not (self._running is None or self._running.done()):
            return
        self._wait()
        self._synced = self._file.num_bytes
        self._running = self._thread.submit(self._file.sync)

    def _wait(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def __enter__(self) -> _SyncBehind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if kind is None:
            self._wait()  # the system tells of a failed write once: to this thread, and not to the last fsync


class _Checksums:
    """CRC-32 of each block of what goes through."""

    def __init__(self) -> None:
        self._done: list[int] = []
        self._current = self._filled = 0

    def add(self, data: memoryview) -> Iterator[memoryview]:
        """Passes the data on in parts of at most a block, each while the cache still has it."""
        at = 0
        while at < len(data):
            part = data[at : at + BLOCK_BYTES - self._filled]
            self._current = zlib.crc32(part, self._current)
            self._filled += len(part)
            at += len(part)
            if self._filled == BLOCK_BYTES:
                self._done.append(self._current)
                self._current = self._filled = 0
            yield part

    def finish(self) -> list[int]:
        return self._done + ([self._current] if self._filled else [])


class VerifiedFile:
    """A file of a checkpoint, of which only blocks with the right checksum are ever given.

    Raises CheckpointError where it is missing, cannot be read, or a block is damaged.
    """

    def __init__(self, path: Path, stored: StoredFile, block_bytes: int) -> None:
        self.path, self._stored, self._block_bytes = path, stored, block_bytes
        self._buffer = memoryview(bytearray(min(block_bytes, stored.bytes)))
        self._held = -1  # the block in the buffer
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise self._explain(f"cannot be opened: {error.strerror}") from error

    def __enter__(self) -> VerifiedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def parts(self, start: int, stop: int) -> Iterator[tuple[int, memoryview]]:
        """Bytes ``[start, stop)`` as (position, bytes), block by block; each is valid until the next is asked for."""
        while start < stop:
            block, within = divmod(start, self._block_bytes)
            content = self.block(block)
            part = content[within : within + stop - start]
            yield start, part
            start += len(part)

    def block(self, index: int) -> memoryview:
        """A block, checked; the buffer that holds it is used again for the next one."""
        begin = index * self._block_bytes
        content = self._buffer[: min(self._block_bytes, self._stored.bytes - begin)]
        if index != self._held:
            self._held = -1
            self._fill(content, begin)
            if zlib.crc32(content) != self._stored.checksums[index]:
                raise self._explain(
                    f"is damaged: bytes {begin:,} to {begin + len(content):,} do not match their checksum"
                )
            self._held = index
        return content

    def _fill(self, content: memoryview, begin: int) -> None:
        filled = 0
        while filled < len(content):
            try:
                count = os.preadv(self._descriptor, [content[filled:]], begin + filled)
            except OSError as error:
                raise self._explain(f"cannot be read at byte {begin + filled:,}: {error.strerror}") from error
            if count == 0:
                raise self._explain(f"is truncated: it has {begin + filled:,} of {self._stored.bytes:,} bytes")
            filled += count

    def _explain(self, what: str) -> CheckpointError:
        others = self.path.parent.parent
        return CheckpointError(f"{self.path}: {what}; copy the checkpoint again, or use another one of {others}")


@dataclass(frozen=True)
class Read:
    """A box of a stored chunk, in the chunk's own coordinates, and the memory that wants it (of the same shape)."""

    name: str
    chunk: StoredChunk
    box: Box
    target: Tensor


def read_all(manifest: Manifest, reads: Iterable[Read]) -> None:
    """Fills the targets from the files, converting the dtype, and reads only blocks that hold a part of them.

    Raises CheckpointError for a block that is damaged, and for values that are not numbers.
    """
    by_file: dict[str, list[Read]] = {}
    for read in reads:
        by_file.setdefault(read.chunk.file, []).append(read)
    for name, of_file in by_file.items():
        with VerifiedFile(manifest.folder / name, manifest.files[name], manifest.block_bytes) as file:
            for read in sorted(of_file, key=lambda read: read.chunk.start):
                _read(file, read, manifest.tensors[read.name].torch_dtype)


def _read(file: VerifiedFile, read: Read, dtype: torch.dtype) -> None:
    sizes, start = read.chunk.sizes, read.chunk.start
    first, last = _flat(sizes, read.box.offsets), _flat(sizes, tuple(end - 1 for end in read.box.ends))
    for at, part in file.parts(start + first * dtype.itemsize, start + (last + 1) * dtype.itemsize):
        values = torch.frombuffer(part, dtype=dtype)
        if not is_finite(values):
            raise CheckpointError(
                f"{file.path}: {read.name} holds values that are not numbers (NaN or infinity): the run had diverged "
                f"when it was written; use an earlier checkpoint of {file.path.parent.parent}"
            )
        begin = (at - start) // dtype.itemsize
        for position, box in flat_boxes(sizes, begin, begin + values.numel()):
            common = box.intersect(read.box)
            if common is not None:
                source = values[position - begin : position - begin + box.numel].view(box.sizes)
                _cut(read.target, common, read.box).copy_(_cut(source, common, box))


def _flat(sizes: Sequence[int], index: Sequence[int]) -> int:
    at = 0
    for size, i in zip(sizes, index, strict=True):
        at = at * size + i
    return at


def _cut(tensor: Tensor, box: Box, origin: Box) -> Tensor:
    """The part of a tensor that lies at ``origin`` which is at ``box``."""
    for dim, (offset, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
        tensor = tensor.narrow(dim, offset - origin.offsets[dim], size)
    return tensor


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite. One pass at the speed of memory: a sum that is a number had only numbers."""
    total = values.sum(dtype=torch.float64 if values.dtype == torch.float64 else torch.float32)
    return math.isfinite(total.item()) or bool(torch.isfinite(values).all())
