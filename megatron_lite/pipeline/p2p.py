"""Tensors between neighbouring stages.

Sends never wait for the other side. On gloo a receive is posted ahead of its use. On NCCL it is posted when it is used:
there the operations of a group run one after the other, in the order in which they were started, and a receive in front
of a send that the neighbour waits for would stop both (1F1B with 4 stages and 5 microbatches does).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_lite.distributed import collectives
from megatron_lite.distributed.collectives import Pending
from megatron_lite.distributed.mesh import Axis


class Inbox:
    """Receives tensors of one shape from one neighbour, in microbatch order.

    Posted ahead, the next transfer runs during the computation in front of it.
    """

    def __init__(
        self,
        axis: Axis,
        from_index: int,
        microbatches: Iterable[int],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._axis, self._from_index = axis, from_index
        self._shape, self._dtype, self._device = shape, dtype, device
        self._expected = deque(microbatches)
        self._posts_ahead = device.type == "cpu"
        self._posted: tuple[int, Pending] | None = None
        if self._posts_ahead:
            self._post_next()

    def _post_next(self) -> None:
        self._posted = None
        if self._expected:
            microbatch = self._expected.popleft()
            buffer = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            pending = collectives.start_receive(buffer, self._axis, self._from_index, tag=microbatch)
            self._posted = (microbatch, pending)

    def take(self, microbatch: int) -> Tensor:
        """Waits for the tensor of ``microbatch``."""
        if not self._posts_ahead:
            self._post_next()
        assert self._posted is not None and self._posted[0] == microbatch, f"{microbatch} is not next: {self._posted}"
        tensor = self._posted[1].wait()
        if self._posts_ahead:
            self._post_next()
        return tensor


class Outbox:
    """Sends tensors to one neighbour, and keeps each alive until it has left."""

    def __init__(self, axis: Axis, to_index: int) -> None:
        self._axis, self._to_index = axis, to_index
        self._leaving: deque[Pending] = deque()

    def send(self, tensor: Tensor, microbatch: int) -> None:
        while self._leaving and self._leaving[0].is_done():
            self._leaving.popleft().wait()
        tensor = tensor.detach().contiguous()
        self._leaving.append(collectives.start_send(tensor, self._axis, self._to_index, tag=microbatch))

    def flush(self) -> None:
        """Waits until everything has left."""
        while self._leaving:
            self._leaving.popleft().wait()
