"""Every collective of the project, each with its dual, and none without its axis.

The pairs stand side by side: what one does in forward, the other does in backward.

=====================  ==========================================  ==========================================
function               forward                                     backward
=====================  ==========================================  ==========================================
``copy_to``            identity                                    all-reduce (sum)
``reduce_from``        all-reduce (sum)                            identity
``gather_tokens``      all-gather along dimension 0                reduce-scatter along dimension 0
``scatter_sum_tokens`` reduce-scatter along dimension 0            all-gather along dimension 0
=====================  ==========================================  ==========================================

Sums that a slice takes part in are made in rank order (exchange the slices all-to-all, then add), so the result does
not depend on an algorithm that the library chose. An axis of size 1 costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite.distributed.faults import lost_in
from megatron_lite.distributed.mesh import Axis


class Pending:
    """A collective under way. ``wait()`` returns its result, or raises LostPeer where another rank does not take part.

    what, axis: its name and over which ranks it goes, for that error.
    """

    def __init__(self, result: Tensor, work: Any = None, what: str = "", axis: Axis | None = None) -> None:
        self._result, self._work, self._what, self._axis = result, work, what, axis

    def wait(self) -> Tensor:
        if self._work is not None:
            assert self._axis is not None
            with waiting(self._what, self._axis):
                self._work.wait()
            self._work = None
        return self._result

    def is_done(self) -> bool:
        return self._work is None or self._work.is_completed()


class waiting:  # reads as a statement; a class, for it costs a fifth of a generator's context
    """Around a wait for other ranks: raises LostPeer where one of them does not take part."""

    __slots__ = ("_axis", "_began", "_what")

    def __init__(self, what: str, axis: Axis) -> None:
        self._what, self._axis = what, axis

    def __enter__(self) -> None:
        self._began = time.time()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            others = [rank for index, rank in enumerate(self._axis.ranks) if index != self._axis.index]
            raised = lost_in(error, self._what, others, self._axis.name, self._began)
            if raised is not error:
                raise raised from error


def all_reduce(tensor: Tensor, axis: Axis, op: str = "sum") -> Tensor:
    """Reduces ``tensor`` in place over ``axis`` (``op``: sum, max or min) and returns it."""
    return start_all_reduce(tensor, axis, op).wait()


def start_all_reduce(tensor: Tensor, axis: Axis, op: str = "sum") -> Pending:
    if axis.size == 1:
        return Pending(tensor)
    operation = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[op]
    work = dist.all_reduce(tensor, op=operation, group=axis.group, async_op=True)
    return Pending(tensor, work, f"all-reduce ({op})", axis)


def start_all_gather(shard: Tensor, axis: Axis, out: Tensor | None = None) -> Pending:
    """Starts to collect the shards of all ranks along dimension 0: ``[n, ...] -> [axis.size * n, ...]``."""
    if axis.size == 1:
        return Pending(shard if out is None else out.copy_(shard))
    if out is None:
        out = shard.new_empty((axis.size * shard.shape[0], *shard.shape[1:]))
    # torch 2.13 has renamed it, and warns of the old name.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return Pending(out, gather(out, shard.contiguous(), group=axis.group, async_op=True), "all-gather", axis)


def all_gather(shard: Tensor, axis: Axis, out: Tensor | None = None) -> Tensor:
    return start_all_gather(shard, axis, out).wait()


def broadcast(tensor: Tensor, axis: Axis, from_index: int) -> Tensor:
    """Fills ``tensor`` with that of the rank at ``from_index``, in place, and returns it. Shapes and dtypes agree."""
    if axis.size > 1:
        with waiting(f"broadcast from rank {axis.ranks[from_index]}", axis):
            dist.broadcast(tensor, src=axis.ranks[from_index], group=axis.group)
    return tensor


class PendingSum(Pending):
    """A reduce-scatter under way: the slices travel, and ``wait()`` adds them in rank order."""

    def wait(self) -> Tensor:
        slices = super().wait()
        total = slices[0].clone()
        for contribution in slices[1:]:
            total += contribution
        return total


def start_reduce_scatter(tensor: Tensor, axis: Axis) -> Pending:
    """Starts ``[axis.size * n, ...] -> [n, ...]``: this rank's slice of the sum over ``axis``, added in rank order."""
    if axis.size == 1:
        return Pending(tensor)
    assert tensor.shape[0] % axis.size == 0, f"{tuple(tensor.shape)} does not divide by {axis.size}"
    received = tensor.new_empty((axis.size, tensor.shape[0] // axis.size, *tensor.shape[1:]))
    work = dist.all_to_all_single(received.view(tensor.shape), tensor.contiguous(), group=axis.group, async_op=True)
    return PendingSum(received, work, "reduce-scatter", axis)


def reduce_scatter(tensor: Tensor, axis: Axis) -> Tensor:
    return start_reduce_scatter(tensor, axis).wait()


def gather_objects(value: Any, axis: Axis) -> list[Any]:
    """Every rank's ``value``, in order of the axis, on every rank. For small things that are no tensors."""
    if axis.size == 1:
        return [value]
    values: list[Any] = [None] * axis.size
    with waiting("gather of objects", axis):
        dist.all_gather_object(values, value, group=axis.group)
    return values


def barrier(axis: Axis) -> None:
    if axis.size > 1:
        with waiting("barrier", axis):
            dist.barrier(group=axis.group)


@dataclass(frozen=True)
class Transfer:
    """A contiguous tensor to or from the rank at ``peer`` on ``axis``; a sent one stays unchanged until it has left.

    tag: both ends give the same; gloo tells messages apart by it. NCCL has no tags, and pairs them by their order.
    """

    tensor: Tensor
    axis: Axis
    peer: int
    is_send: bool
    tag: int = 0


def start_transfers(transfers: Sequence[Transfer]) -> list[Pending]:
    """Starts messages between pairs of ranks; on GPUs those over one axis as a group, in which none waits for another.

    ``wait()`` of each returns its tensor.
    """
    pending: dict[int, Pending] = {}
    for axis in dict.fromkeys(transfer.axis for transfer in transfers):
        group = [i for i, transfer in enumerate(transfers) if transfer.axis == axis]
        operations = [_operation(transfers[i]) for i in group]
        if transfers[group[0]].tensor.is_cuda:
            works: list[Any] = dist.batch_isend_irecv(operations)
            works = works if len(works) == len(group) else works * len(group)  # NCCL gives one for the whole group
        else:
            works = [one.op(one.tensor, one.peer, group=one.group, tag=one.tag) for one in operations]
        for i, work in zip(group, works, strict=True):
            direction = "send to" if transfers[i].is_send else "receive from"
            what = f"{direction} rank {axis.ranks[transfers[i].peer]}"
            pending[i] = Pending(transfers[i].tensor, work, what, axis)
    return [pending[i] for i in range(len(transfers))]


def _operation(transfer: Transfer) -> dist.P2POp:
    assert transfer.tensor.is_contiguous()
    operation = dist.isend if transfer.is_send else dist.irecv
    rank, group = transfer.axis.ranks[transfer.peer], transfer.axis.group
    return dist.P2POp(operation, transfer.tensor, rank, group=group, tag=transfer.tag)


def start_send(tensor: Tensor, axis: Axis, to_index: int, tag: int = 0) -> Pending:
    return start_transfers([Transfer(tensor, axis, to_index, is_send=True, tag=tag)])[0]


def start_receive(buffer: Tensor, axis: Axis, from_index: int, tag: int = 0) -> Pending:
    return start_transfers([Transfer(buffer, axis, from_index, is_send=False, tag=tag)])[0]


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad.contiguous().clone(), ctx.axis), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce(x.contiguous().clone(), axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grad, ctx.axis), None


class _ScatterSumTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, ctx.axis), None


def copy_to(x: Tensor, axis: Axis) -> Tensor:
    """Enters a region where each rank computes a part of the output: the gradients of the parts are summed."""
    return x if axis.size == 1 else _CopyTo.apply(x, axis)


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """Leaves a region where each rank holds a partial sum."""
    return x if axis.size == 1 else _ReduceFrom.apply(x, axis)


def gather_tokens(x: Tensor, axis: Axis) -> Tensor:
    """``[T / axis.size, H] -> [T, H]``; each rank's gradient of the whole is a partial sum."""
    return x if axis.size == 1 else _GatherTokens.apply(x, axis)


def scatter_sum_tokens(x: Tensor, axis: Axis) -> Tensor:
    """Partial sums ``[T, H]`` to this rank's tokens of the sum, ``[T / axis.size, H]``."""
    return x if axis.size == 1 else _ScatterSumTokens.apply(x, axis)
