"""Tensors between pipeline ranks, as a list of instructions says.

Sends never wait for the other side. A receive is posted at its place in the list, which is where the tensor can come at
the earliest; what needs the tensor waits for it. On CPUs receives are posted further ahead, so that a rank that is late
in its list does not hold its neighbour's transfer up. On NCCL they are not: there the operations of a group run one
after the other, in the order in which they were started, and only the order of the lists is proven to end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from queue import SimpleQueue
from threading import Thread

import torch
from torch import Tensor

from megatron_lite.distributed import collectives
from megatron_lite.distributed.collectives import Pending, Transfer
from megatron_lite.distributed.faults import LostPeer
from megatron_lite.distributed.mesh import Mesh
from megatron_lite.pipeline.instructions import RECEIVES, SENDS, Instruction, InstructionList, Kind, Placement

# Receives that are posted before their place in the list, where order does not matter.
POSTED_AHEAD = 2


class _Departures:
    """Sends on their way. Each tensor is let go of as soon as it has left.

    NCCL can be asked, and to wait for it would hold the computing up. gloo tells that a send has ended only to who
    waits for it: a thread does, beside the computing.
    """

    def __init__(self, device: torch.device) -> None:
        self._leaving: list[tuple[Instruction, Pending]] = []
        self._failures: list[tuple[Instruction, Exception]] = []
        self._queue: SimpleQueue[tuple[Instruction, Pending] | None] = SimpleQueue()
        self._thread = Thread(target=self._wait_for_each, daemon=True) if device.type == "cpu" else None
        if self._thread is not None:
            self._thread.start()

    def add(self, send: Instruction, pending: Pending) -> None:
        if self._thread is not None:
            self._queue.put((send, pending))
        else:
            self._leaving = [*(one for one in self._leaving if not one[1].is_done()), (send, pending)]

    def close(self) -> None:
        """Ends the thread when what it has left has left, without waiting for that."""
        self._queue.put(None)

    def finish(self) -> list[tuple[Instruction, Exception]]:
        """Waits until everything has left; what did not, and why."""
        for one in self._leaving:
            self._queue.put(one)
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join()
        else:
            self._wait_for_each()
        return self._failures

    def _wait_for_each(self) -> None:
        while (leaving := self._queue.get()) is not None:
            send, pending = leaving
            try:
                pending.wait()
            except Exception as error:
                self._failures.append((send, error))
            del leaving, pending


class Mail:
    """The messages of one rank in one run of a schedule. Every tensor has the same shape.

    num_microbatches: of the run; with the chunk's number it makes a message's tag.
    """

    def __init__(
        self,
        instructions: InstructionList,
        placement: Placement,
        num_microbatches: int,
        *,
        mesh: Mesh,
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        self._placement, self._num_microbatches, self._mesh = placement, num_microbatches, mesh
        self._shape, self._dtype = shape, dtype
        self._unposted = deque(i for i in instructions if i.kind in RECEIVES)
        self._posted: dict[Instruction, Pending] = {}
        self._departures = _Departures(mesh.device) if any(i.kind in SENDS for i in instructions) else None
        self._ahead = POSTED_AHEAD if mesh.device.type == "cpu" else 0
        self._start(self._next_receives(self._ahead))

    def exchange(self, receives: Sequence[Instruction], sends: Sequence[tuple[Instruction, Tensor]]) -> None:
        """Starts messages that stand side by side in the list; on GPUs in one group, in which none waits for another.

        The tensors of sends must stay unchanged; they are kept alive until they have left.
        """
        self._start(self._next_receives(len(receives)), sends)

    def take(self, receive: Instruction, used_by: Instruction) -> Tensor:
        """Waits for a tensor. Raises LostPeer where it does not come."""
        try:
            return self._posted.pop(receive).wait()
        except RuntimeError as error:
            raise self._lost(f"waited in {used_by} to {receive}", receive, error) from error

    def flush(self) -> None:
        """Waits until everything has left."""
        assert not self._unposted and not self._posted, f"never used: {[*self._posted, *self._unposted]}"
        if self._departures is not None:
            for send, error in self._departures.finish():
                raise self._lost(f"waited to {send}", send, error) from error

    def close(self) -> None:
        """To be called at the end, also where it is an error."""
        if self._departures is not None:
            self._departures.close()

    def _next_receives(self, count: int) -> list[Instruction]:
        return [self._unposted.popleft() for _ in range(min(count, len(self._unposted)))]

    def _start(self, receives: Sequence[Instruction], sends: Sequence[tuple[Instruction, Tensor]] = ()) -> None:
        device = self._mesh.device
        buffers = [torch.empty(self._shape, dtype=self._dtype, device=device) for _ in receives]
        transfers = [self._transfer(i, buffer) for i, buffer in zip(receives, buffers, strict=True)]
        transfers += [self._transfer(i, tensor.contiguous()) for i, tensor in sends]
        try:
            pending = collectives.start_transfers(transfers)
        except RuntimeError as error:  # the other rank is gone already
            first = [*receives, *(i for i, _ in sends)][0]
            raise self._lost(f"began to {first}", first, error) from error
        self._posted.update(zip(receives, pending, strict=False))
        for (send, _), leaving in zip(sends, pending[len(receives) :], strict=True):
            assert self._departures is not None
            self._departures.add(send, leaving)

    def _transfer(self, instruction: Instruction, tensor: Tensor) -> Transfer:
        kind, chunk, microbatch = instruction
        is_send = kind not in RECEIVES
        axis = self._mesh.pp if kind in (Kind.SEND_ACTIVATION, Kind.RECEIVE_ACTIVATION) else self._mesh.pp_return
        sender = chunk if is_send else self._other_chunk(instruction)
        return Transfer(tensor, axis, self._peer(instruction), is_send, sender * self._num_microbatches + microbatch)

    def _other_chunk(self, instruction: Instruction) -> int:
        """The chunk at the other end of a message."""
        goes_up = instruction.kind in (Kind.SEND_ACTIVATION, Kind.RECEIVE_GRADIENT)
        return instruction.chunk + (1 if goes_up else -1)

    def _peer(self, instruction: Instruction) -> int:
        return self._placement.rank_of[self._other_chunk(instruction)]

    def _lost(self, what: str, instruction: Instruction, error: Exception) -> LostPeer:
        own, peer = self._mesh.pp.index, self._peer(instruction)
        direction = "to" if instruction.kind not in RECEIVES else "from"
        return LostPeer(f"pipeline rank {own} {what} {direction} pipeline rank {peer}: {error}")
