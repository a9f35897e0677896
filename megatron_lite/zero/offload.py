"""Where the flat tensors of buckets wait for their use: in main memory, or in files on a disk (``offload.*``).

Rajbhandari et al. 2021 (ZeRO-Infinity, arXiv:2104.07857). A transfer is of one flat tensor: the slice of a bucket's
master weights, of one moment, gradients or parameters. `BucketStream` walks over buckets so that the next one is read
and the last one written while one is computed on. Nothing here computes, so no bit of a result can change.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatron_lite.zero.files import FileTensor, IoThreads, OffloadError
from megatron_lite.zero.offload_folder import OffloadFolder

NUM_SETS = 3  # one bucket is read, one computed on, one written


class Pending(Protocol):
    """A transfer on its way."""

    def wait(self) -> None:
        """Returns when what was filled may be read, and what was written may be changed, by this thread and by what
        it starts on the device from now on. Raises OffloadError."""


class StoredTensor(Protocol):
    """A flat tensor ``[numel]`` that lies elsewhere than where it is used.

    in_place: the memory itself where one can compute on it as it is; it then needs no buffer, no read and no write.
    memory: what holds it, wherever one computes. file_bytes: of its file as that is now, where there is no memory.
    """

    numel: int
    dtype: torch.dtype

    @property
    def in_place(self) -> Tensor | None: ...

    @property
    def memory(self) -> Tensor | None: ...

    @property
    def file_bytes(self) -> int: ...

    def read(self, into: Tensor) -> Pending: ...

    def write(self, source: Tensor) -> Pending: ...

    def mapped(self) -> Tensor: ...

    def close(self) -> None: ...


class Resident:
    """A flat tensor that lies where it is used."""

    file_bytes = 0

    def __init__(self, tensor: Tensor) -> None:
        self.numel, self.dtype, self.in_place, self.memory = tensor.numel(), tensor.dtype, tensor, tensor

    def read(self, into: Tensor) -> Pending:
        into.copy_(self.in_place)
        return NOTHING

    def write(self, source: Tensor) -> Pending:
        self.in_place.copy_(source)
        return NOTHING

    def mapped(self) -> Tensor:
        return self.in_place

    def close(self) -> None:
        pass


class MappedTensors(Mapping[str, Tensor]):
    """Stored tensors by kind, each as one tensor for who looks at it now and then: in place, or a map of its file."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self.stored = stored

    def __getitem__(self, kind: str) -> Tensor:
        return mapped(self.stored[kind])

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def mapped(stored: StoredTensor) -> Tensor:
    """The memory itself, or a map of the file. What is written to it is stored."""
    return stored.mapped() if stored.in_place is None else stored.in_place


@contextmanager
def loaded(stored: StoredTensor, *, reads: bool = True, writes: bool = False) -> Iterator[Tensor]:
    """The tensor while the block lasts: in place, or what a file holds, in main memory of its own.

    reads: False where the block fills it. writes: what the block leaves in it is stored, of which the end is not waited
    for. Raises OffloadError, also for an earlier write, where a map would end the process.
    """
    if stored.in_place is not None:
        yield stored.in_place
        return
    values = torch.empty(stored.numel, dtype=stored.dtype)
    if reads:
        stored.read(values).wait()
    yield values
    if writes:
        stored.write(values)


class _Nothing:
    """A transfer of nothing."""

    def wait(self) -> None:
        pass


NOTHING = _Nothing()


class HostTensor:
    """A flat tensor in main memory, full of zeros. device: where it is used.

    For a GPU it is pinned, and copies run on a stream of their own, which begins when what the current stream does
    with the memory until now is done. For the CPU it is used as it is; ``pinned`` serves copies that others make.
    """

    file_bytes = 0

    def __init__(
        self, numel: int, dtype: torch.dtype, *, device: torch.device, pinned: bool, stream: torch.cuda.Stream | None
    ) -> None:
        assert (stream is not None) == (device.type == "cuda"), device
        self.numel, self.dtype, self._stream = numel, dtype, stream
        self._host = torch.zeros(numel, dtype=dtype, pin_memory=pinned)
        self.in_place = self._host if stream is None else None

    @property
    def memory(self) -> Tensor:
        return self._host

    def read(self, into: Tensor) -> Pending:
        """Begins to fill ``into``, ``[numel]`` on the device."""
        return self._copy(into, self._host)

    def write(self, source: Tensor) -> Pending:
        """Begins to copy ``source``, ``[numel]`` on the device, to main memory."""
        return self._copy(self._host, source)

    def mapped(self) -> Tensor:
        """The main memory itself, after copies on their way to it."""
        if self._stream is not None:
            self._stream.synchronize()
        return self._host

    def close(self) -> None:
        self._host = self._host.new_empty(0)
        self.in_place = None

    def _copy(self, target: Tensor, source: Tensor) -> Pending:
        if self._stream is None:
            if target.data_ptr() != source.data_ptr():
                target.copy_(source)
            return NOTHING
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return _DeviceCopy(self._stream.record_event(), to_host=target is self._host)


class _DeviceCopy:
    """A copy between a device and pinned memory, up to ``event``."""

    def __init__(self, event: torch.cuda.Event, to_host: bool) -> None:
        self._event, self._to_host = event, to_host

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)
        if self._to_host:
            self._event.synchronize()


class StagedTensor:
    """A file whose tensor is used on a GPU: through pinned memory, which lives as long as a transfer."""

    in_place: Tensor | None = None
    memory: Tensor | None = None

    def __init__(self, file: FileTensor, *, pinned: bool) -> None:
        self.file, self.numel, self.dtype, self._pinned = file, file.numel, file.dtype, pinned

    @property
    def file_bytes(self) -> int:
        return self.file.file_bytes

    def read(self, into: Tensor) -> Pending:
        """Begins to fill ``into``, ``[numel]`` on the device."""
        staging = self._staging()
        return _StagedRead(self.file.read(staging), staging, into)

    def write(self, source: Tensor) -> Pending:
        """Copies ``source``, ``[numel]`` on the device, when the current stream has made it, and begins to write."""
        return self.file.write(self._staging().copy_(source))

    def mapped(self) -> Tensor:
        return self.file.mapped()

    def close(self) -> None:
        self.file.close()

    def _staging(self) -> Tensor:
        return torch.empty(self.numel, dtype=self.dtype, pin_memory=self._pinned)


class _StagedRead:
    def __init__(self, reading: Pending, staging: Tensor, into: Tensor) -> None:
        self._reading, self._staging, self._into = reading, staging, into

    def wait(self) -> None:
        self._reading.wait()
        self._into.copy_(self._staging, non_blocking=True)


class OffloadStore:
    """Makes the stored tensors of a process, and removes them at the end.

    directory: ``offload.dir``, or None where nothing is in files. run, rank: for the name of the folder there.
    device: of the model. Raises OffloadError as `OffloadFolder` does.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None,
        *,
        run: str,
        rank: int,
        device: torch.device,
        threads: IoThreads | None = None,
    ) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._folder = OffloadFolder(directory, run=run, rank=rank) if directory is not None else None
        self._threads = threads or IoThreads()
        self._tensors: list[StoredTensor] = []

    def tensor(
        self, place: Literal["cpu", "nvme"], name: str, numel: int, dtype: torch.dtype, *, used_on: torch.device
    ) -> StoredTensor:
        """A tensor ``[numel]`` full of zeros. name: of its own, of the bucket and what it is of it.

        used_on: the model's device, or the CPU for what the optimizer computes there. Raises OffloadError where a disk
        has no room for it.
        """
        pinned = self._stream is not None
        made: StoredTensor
        if place == "cpu":
            stream = self._stream if used_on.type == "cuda" else None
            made = HostTensor(numel, dtype, device=used_on, pinned=pinned, stream=stream)
        else:
            assert self._folder is not None, "offload.dir is needed for nvme; megatron_lite/config/offload_rules.py"
            file = FileTensor(self._folder.file(name), numel, dtype, threads=self._threads)
            made = file if used_on.type == "cpu" else StagedTensor(file, pinned=pinned)
        self._tensors.append(made)
        return made

    def close(self) -> None:
        """Waits for transfers on their way, and removes the files."""
        for tensor in self._tensors:
            tensor.close()
        self._tensors = []
        self._threads.close()
        if self._folder is not None:
            self._folder.close()

    def __enter__(self) -> OffloadStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class BucketStream:
    """Walks over buckets with their stored tensors in main memory, each kind (master, a moment, ...) by its name.

    The memory is three sets of buffers for the whole run, in each set one for every kind that has none in place, as
    large as that kind's largest tensor. pinned: whether copies between the buffers and a GPU are made.
    """

    def __init__(self, buckets: Mapping[str, Mapping[str, StoredTensor]], *, pinned: bool = False) -> None:
        self._buckets = buckets
        largest: dict[str, StoredTensor] = {}
        for tensors in buckets.values():
            for kind, tensor in tensors.items():
                if tensor.in_place is None and (kind not in largest or tensor.numel > largest[kind].numel):
                    largest[kind] = tensor
        self._sets = [
            {kind: torch.empty(one.numel, dtype=one.dtype, pin_memory=pinned) for kind, one in largest.items()}
            for _ in range(min(NUM_SETS, len(buckets)))
        ]
        self._writing: list[list[Pending]] = [[] for _ in self._sets]  # by set

    @property
    def num_bytes(self) -> int:
        """Of all buffers."""
        return sum(buffer.nbytes for buffers in self._sets for buffer in buffers.values())

    def walk(
        self, order: Sequence[str], *, reads: Collection[str], writes: Collection[str]
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Each bucket of ``order`` with its tensors, by kind; what the caller makes of them is stored afterwards.

        reads: the kinds that come with the stored values; of the others, unless they are in place, the values are
        anything. writes: the kinds that are stored. A tensor that is in place is the stored one itself, whatever is
        read and written. The tensors are good until the next step of the iteration.

        The last writes go on after the end; what next uses the same tensors or buffers waits for them. Raises
        OffloadError when a transfer has failed, also one of an earlier walk.
        """
        assert len(set(order)) == len(order), "a bucket that is read ahead of its own write would be an old one"
        reading: deque[list[Pending]] = deque()
        try:
            for position, name in enumerate(order):
                for ahead in range(position + len(reading), min(position + 2, len(order))):
                    reading.append(self._start_reading(order[ahead], ahead, reads))
                for one in reading.popleft():
                    one.wait()
                tensors = self._tensors(name, position)
                yield name, tensors
                self._writing[position % len(self._sets)] = [
                    stored.write(tensors[kind])
                    for kind, stored in self._buckets[name].items()
                    if kind in writes and stored.in_place is None
                ]
        finally:
            for one in (one for ahead_of_use in reading for one in ahead_of_use):  # where the caller stopped early
                with suppress(OffloadError):
                    one.wait()

    def wait(self) -> None:
        """Waits for all writes. Raises OffloadError."""
        for index in range(len(self._sets)):
            self._wait_for_set(index)

    def close(self) -> None:
        """Waits, and gives the memory back; a failure on the way is no longer of interest."""
        with suppress(OffloadError):
            self.wait()
        self._sets = []

    def _start_reading(self, name: str, position: int, reads: Collection[str]) -> list[Pending]:
        self._wait_for_set(position % len(self._sets))
        tensors = self._tensors(name, position)
        return [
            stored.read(tensors[kind])
            for kind, stored in self._buckets[name].items()
            if kind in reads and stored.in_place is None
        ]

    def _wait_for_set(self, index: int) -> None:
        writing, self._writing[index] = self._writing[index], []
        for one in writing:
            one.wait()

    def _tensors(self, name: str, position: int) -> dict[str, Tensor]:
        buffers = self._sets[position % len(self._sets)]
        return {
            kind: buffers[kind][: stored.numel] if stored.in_place is None else stored.in_place
            for kind, stored in self._buckets[name].items()
        }
