"""From slices to whole matrices and back: each matrix of a bucket is on one rank while it is worked on.

The ranks that share a bucket are a grid, slices x tp. A matrix has a worker in it. Its elements go first over the
slices, to the worker's row of the grid, where each tp rank then has its whole part, then over tp, to the worker; the
result goes back the same way. Each element travels once over each axis, and back. Where the region is the whole bucket
(ZeRO 0) the work is shared all the same, and only the results travel over the slices' ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.distributed import collectives
from megatron_lite.distributed.collectives import Transfer
from megatron_lite.distributed.mesh import Axis
from megatron_lite.optim.matrices import Matrix
from megatron_lite.optim.optimizer import Axes, Region


@dataclass(frozen=True)
class Worker:
    """The rank that a matrix is worked on: its index among the slices, and on tp."""

    slice: int
    tp: int


def assign(matrices: Sequence[Matrix], num_slices: int, tp: int) -> list[Worker]:
    """A worker for each matrix: the costliest first, each to the rank with the least work so far.

    Cost: multiplications, of the product of a matrix with its transpose.
    """
    costs = [min(matrix.shape) * math.prod(matrix.shape) for matrix in matrices]
    load, workers = [0] * (num_slices * tp), [Worker(0, 0)] * len(matrices)
    for number in sorted(range(len(matrices)), key=lambda n: -costs[n]):
        rank = load.index(min(load))
        load[rank] += costs[number]
        workers[number] = Worker(rank % num_slices, rank // num_slices)
    return workers


class MatrixExchange:
    """The way there and back, for the matrices of one region. All ranks of both axes go it together.

    values: ``[n]``, of the region. Matrices are told by their numbers in ``matrices``.
    """

    def __init__(self, region: Region, matrices: Sequence[Matrix], axes: Axes) -> None:
        self._region, self._matrices, self._axes = region, matrices, axes
        self._workers = assign(matrices, axes.slices.size, axes.tp.size)
        # Those that pass through this rank, and of them those that end here.
        self._row = [n for n, worker in enumerate(self._workers) if worker.slice == axes.slices.index]
        self._own = [n for n in self._row if self._workers[n].tp == axes.tp.index]

    def gather(self, values: Tensor) -> dict[int, Tensor]:
        """The whole matrices that this rank works on."""
        region, slices, tp = self._region, self._axes.slices, self._axes.tp
        parts = {n: values.new_empty(self._part_size(n, tp.index)) for n in self._row}
        if region.is_whole:
            for n, part in parts.items():
                part.copy_(values[self._matrices[n].start : self._matrices[n].stop])
        else:
            outgoing = [[values[span] for _, span, _ in self._spans(slices.index, to)] for to in range(slices.size)]
            places = [[parts[n][place] for n, _, place in self._spans(by, slices.index)] for by in range(slices.size)]
            exchange(outgoing, places, slices, self._axes.device)
        whole = {n: values.new_empty(self._matrices[n].shape) for n in self._own}
        outgoing = [
            [parts[n] for n in self._row if self._workers[n].tp == to and self._is_counted(n, tp.index)]
            for to in range(tp.size)
        ]
        places = [
            [self._part_of(whole[n], n, by) for n in self._own if self._is_counted(n, by)] for by in range(tp.size)
        ]
        exchange(outgoing, places, tp, self._axes.device)
        return whole

    def scatter(self, results: dict[int, Tensor], values: Tensor) -> None:
        """Writes the region's elements of all matrices. results: those of this rank; where ranks hold the same
        elements each gets them."""
        slices, tp = self._axes.slices, self._axes.tp
        parts = {n: values.new_empty(self._part_size(n, tp.index)) for n in self._row}
        outgoing = [[self._part_of(results[n], n, to) for n in self._own] for to in range(tp.size)]
        places = [[parts[n] for n in self._row if self._workers[n].tp == by] for by in range(tp.size)]
        exchange(outgoing, places, tp, self._axes.device)
        outgoing = [[parts[n][place] for n, _, place in self._spans(to, slices.index)] for to in range(slices.size)]
        places = [[values[span] for _, span, _ in self._spans(slices.index, by)] for by in range(slices.size)]
        exchange(outgoing, places, slices, self._axes.device)

    def _spans(self, holder: int, worker: int) -> Iterator[tuple[int, slice, slice]]:
        """What the rank ``holder`` of the slices has of the matrices of a row of workers, in the order of matrices:
        (number, elements of its region, elements of the matrix's part)."""
        begin, end = (0, self._region.size) if self._region.is_whole else self._region.slice(holder)
        for n, (matrix, at) in enumerate(zip(self._matrices, self._workers, strict=True)):
            start, stop = max(matrix.start, begin), min(matrix.stop, end)
            if at.slice == worker and start < stop:
                yield n, slice(start - begin, stop - begin), slice(start - matrix.start, stop - matrix.start)

    def _is_counted(self, number: int, tp_index: int) -> bool:
        return self._matrices[number].parts[tp_index].is_counted

    def _part_size(self, number: int, tp_index: int) -> int:
        return math.prod(self._matrices[number].part_shape(tp_index))

    def _part_of(self, whole: Tensor, number: int, tp_index: int) -> Tensor:
        matrix = self._matrices[number]
        part = matrix.parts[tp_index]
        return whole.narrow(matrix.dim, part.start, part.stop - part.start)


def exchange(
    outgoing: Sequence[Sequence[Tensor]], places: Sequence[Sequence[Tensor]], axis: Axis, device: torch.device
) -> None:
    """Fills ``places[i]`` with what rank ``i`` of the axis has in its ``outgoing`` for this one, tensor by tensor.

    Sizes and order agree on both ends; shapes need not be contiguous. One message travels between two ranks.
    device: on which it travels.
    """
    sent = {i: _packed(tensors).to(device) for i, tensors in enumerate(outgoing) if tensors}
    received = {i: ps[0].new_empty(sum(p.numel() for p in ps), device=device) for i, ps in enumerate(places) if ps}
    transfers = [Transfer(tensor, axis, i, is_send=True) for i, tensor in sent.items() if i != axis.index]
    transfers += [Transfer(tensor, axis, i, is_send=False) for i, tensor in received.items() if i != axis.index]
    for pending in collectives.start_transfers(transfers):
        pending.wait()
    if axis.index in received:
        received[axis.index] = sent[axis.index]
    for i, tensor in received.items():
        pieces = tensor.split([place.numel() for place in places[i]])
        for place, piece in zip(places[i], pieces, strict=True):
            place.copy_(piece.view(place.shape))


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
