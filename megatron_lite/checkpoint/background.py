"""Saving in the background: steps go on while tensors are copied and written; the next update waits for the copy."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lite.checkpoint import store
from megatron_lite.checkpoint.chunks import Chunk, GlobalTensor
from megatron_lite.config.schema import ModelConfig
from megatron_lite.distributed.mesh import Axis


class BackgroundSaver:
    """Saves checkpoints in a thread of its own, one at a time.

    axis: over all ranks that save, with a group that nothing else uses: its collectives run beside those of the steps.
        On gloo, since it carries plans and no tensors.

    ``save`` returns at once. The thread copies the tensors into buffers that are kept from one save to the next
    (pinned, if the tensors are on a GPU), then writes the copy. Who owns the tensors calls ``settle`` before changing
    them. What goes wrong in the thread is raised on every rank by the next ``save`` or ``wait``, which every rank has
    to call.
    """

    def __init__(self, axis: Axis) -> None:
        self._axis = axis
        self._buffers: dict[torch.dtype, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._is_copied = threading.Event()
        self._is_copied.set()

    def save(
        self,
        folder: str | Path,
        tensors: Sequence[GlobalTensor],
        *,
        state: dict[str, Any],
        model: ModelConfig,
        then: Callable[[], None] | None = None,
    ) -> None:
        """Starts to save, as `store.save` does, what the tensors hold; they may change once ``settle`` has returned.

        Waits for the save before, if it is not done. then: called in the thread of the first rank when the checkpoint
        is in its place; what it raises is raised on that rank alone, so it should not.

        Raises CheckpointError if the save before failed; nothing is saved then.
        """
        self.wait()
        self.reserve(tensors)
        devices = {chunk.values.device for tensor in tensors for chunk in tensor.chunks}
        # What the streams that compute have been given so far makes the values that the copy is of.
        made = [torch.cuda.current_stream(device).record_event() for device in devices if device.type == "cuda"]
        self._is_copied.clear()

        def work() -> None:
            try:
                snapshot = self._copy(tensors, made)
                self._is_copied.set()
                store.save(folder, snapshot, state=state, model=model, axis=self._axis)
                if then is not None and self._axis.is_first:
                    then()
            except BaseException as error:  # whatever it is, it has to reach the thread that trains
                self._error = error
            finally:
                self._is_copied.set()

        # A daemon, so that a process whose peers have died can end.
        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    def settle(self) -> None:
        """Returns when the values of the last ``save`` are copied, or could not be: from then on they may change."""
        self._is_copied.wait()

    def wait(self) -> None:
        """Returns when nothing is being saved. Raises what went wrong since the last call, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    @property
    def is_busy(self) -> bool:
        """Whether a save is under way on this rank."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """Whether a save has gone wrong on this rank, which the next ``save`` or ``wait`` raises."""
        return self._error is not None

    def reserve(self, tensors: Sequence[GlobalTensor]) -> None:
        """Makes the buffers ahead of the first save, which then takes no longer than those after it."""
        sizes: dict[torch.dtype, int] = {}
        is_pinned = False
        for tensor in tensors:
            for chunk in tensor.chunks:
                is_pinned |= chunk.values.is_cuda
                sizes[chunk.values.dtype] = sizes.get(chunk.values.dtype, 0) + chunk.values.numel()
        for dtype, size in sizes.items():
            if dtype not in self._buffers or self._buffers[dtype].numel() < size:
                # Zeros written now, so that no page is missing when a step waits for the copy.
                self._buffers[dtype] = torch.empty(size, dtype=dtype, pin_memory=is_pinned).zero_()

    def _copy(self, tensors: Sequence[GlobalTensor], made: Sequence[torch.cuda.Event]) -> list[GlobalTensor]:
        """The tensors in the buffers. made: happen when the tensors on GPUs have their values."""
        with contextlib.ExitStack() as streams:
            # Streams of their own, one on each device, beside which the computing goes on.
            copying = [torch.cuda.Stream(event.device) for event in made]
            for stream, event in zip(copying, made, strict=True):
                stream.wait_event(event)
                streams.enter_context(torch.cuda.stream(stream))
            snapshot = self._copy_chunks(tensors)
            for stream in copying:
                stream.synchronize()
        return snapshot

    def _copy_chunks(self, tensors: Sequence[GlobalTensor]) -> list[GlobalTensor]:
        used = dict.fromkeys(self._buffers, 0)
        snapshot = []
        for tensor in tensors:
            chunks = []
            for chunk in tensor.chunks:
                values, dtype = chunk.values.detach(), chunk.values.dtype
                copy = self._buffers[dtype][used[dtype] : used[dtype] + values.numel()].view(values.shape)
                copy.copy_(values, non_blocking=True)
                used[dtype] += values.numel()
                chunks.append(Chunk(chunk.offsets, copy))
            snapshot.append(replace(tensor, chunks=tuple(chunks)))
        return snapshot
