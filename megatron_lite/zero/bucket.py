"""One flat bucket: parameters, gradients and master weights of a unit, as contiguous memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_lite.models.identity import ParameterSpec, Piece
from megatron_lite.ops.accumulate import accumulate
from megatron_lite.zero.partition import ALIGNMENT, BucketLayout, Interval, merge


@dataclass(frozen=True)
class PartialSum:
    """Elements of a bucket whose gradient is a partial sum over tp.

    Each rank puts its ``local`` elements at ``place`` in a buffer that is zero elsewhere; the buffers are summed. So
    ranks that hold the same key-value head meet, and ranks that hold different ones do not.
    """

    parameter: str
    local: Interval
    place: Interval


class Bucket:
    """Flat memory of a unit. ``region`` is what this rank updates: the whole (stage 0) or its slice (stage 1).

    parameters: ``[size]`` in the compute dtype; the model's parameters are views of it.
    gradients: ``[size]`` in the accumulation dtype; sums over microbatches, then over ranks.
    master: ``[region]`` in the optimizer's dtype; a view of ``parameters`` where the dtypes agree.
    uncounted: elements that another rank, or the parameter that this one is tied to, counts in the gradient norm.
    undecayed: elements without weight decay.
    """

    def __init__(
        self,
        layout: BucketLayout,
        parameters: dict[str, nn.Parameter],
        *,
        region: Interval,
        param_dtype: torch.dtype,
        grad_dtype: torch.dtype,
        device: torch.device,
        shared_with: Bucket | None,
    ) -> None:
        self.layout, self.region, self.shared_with = layout, region, shared_with
        self.gradients = torch.zeros(layout.size, dtype=grad_dtype, device=device)
        if shared_with is None:
            self.parameters = torch.zeros(layout.size, dtype=param_dtype, device=device)
        else:
            self.parameters = shared_with.parameters
        self.master = self.parameters[region.start : region.stop]
        if shared_with is not None:
            self.master = shared_with.master
        elif param_dtype != grad_dtype:
            self.master = self.master.to(grad_dtype)
        self._copied_first: list[str] = []  # parameters whose gradients a hook adds up
        self._stale: set[str] = set()  # of these, those that hold the sum of an earlier step
        self.partial_sums: list[PartialSum] = []
        self.uncounted: list[Interval] = []
        self.undecayed: list[Interval] = []
        for slot in layout.slots:
            self._adopt(slot.name, parameters[slot.name], slot.interval)

    def _adopt(self, name: str, parameter: nn.Parameter, where: Interval) -> None:
        """Makes a parameter a view of the bucket, and sends its gradients there."""
        view = self.parameters[where.start : where.stop].view(parameter.shape)
        gradient = self.gradients[where.start : where.stop].view(parameter.shape)
        parameter.data = view
        if parameter.dtype == gradient.dtype:
            parameter.grad = gradient  # autograd adds to it in place
            return

        def add(parameter: Tensor) -> None:
            if parameter.grad is None:
                return  # autograd runs hooks also where a backward has left a gradient for later: ops/linear.py
            if name in self._stale:
                gradient.copy_(parameter.grad)
                self._stale.discard(name)
            else:
                accumulate(gradient, parameter.grad)
            parameter.grad = None

        self._copied_first.append(name)
        parameter.register_post_accumulate_grad_hook(add)

    def zero_gradients(self) -> None:
        """Makes all gradients zero; where a hook adds them up, the first of a step is copied over what was there."""
        if len(self._copied_first) < len(self.layout.slots):
            self.gradients.zero_()
        self._stale = set(self._copied_first)

    def clear_stale_gradients(self) -> None:
        """Zeroes what no gradient has come for since ``zero_gradients``."""
        for slot in self.layout.slots:
            if slot.name in self._stale:
                self.gradients[slot.interval.start : slot.interval.stop] = 0
        self._stale = set()

    def describe(self, specs: dict[str, ParameterSpec], tp: int, index: int, sequence_parallel: bool) -> None:
        """Reads from the identities which elements are partial sums, count in the norm, and decay."""
        place = 0
        for slot in self.layout.slots:
            spec = specs[slot.name]
            if not spec.decay:
                self.undecayed.append(slot.interval)
            if spec.tied_to is not None:
                self.uncounted.append(slot.interval)
            else:
                self.uncounted += [
                    _elements(spec, piece, slot.start)
                    for piece in spec.shard(tp, index).pieces
                    if not piece.is_first_replica
                ]
            place = self._find_partial_sums(spec, slot.start, place, tp, index, sequence_parallel)
        self.uncounted, self.undecayed = merge(self.uncounted), merge(self.undecayed)
        self.partial_buffer_size = place

    def _find_partial_sums(
        self, spec: ParameterSpec, start: int, place: int, tp: int, index: int, sequence_parallel: bool
    ) -> int:
        is_whole = spec.shard_dim is None
        if tp == 1 or (is_whole and not (sequence_parallel and spec.partial_under_sequence_parallel)):
            return place
        width = spec.numel // spec.shape[spec.shard_dim or 0]
        offset = 0
        for piece, block in zip(spec.shard(tp, index).pieces, spec.blocks or (None,), strict=True):
            block_start, block_size = (0, spec.shape[0]) if block is None else (offset, block.size)
            if piece.replicas > 1:
                local = _elements(spec, piece, start)
                first = place + (piece.start - block_start) * width
                self.partial_sums.append(PartialSum(spec.name, local, Interval(first, first + local.size)))
                place += block_size * width
            offset += block_size
        return place

    def region_gradients(self) -> Tensor:
        return self.gradients[self.region.start : self.region.stop]

    def rounded_region(self) -> Tensor | None:
        """The region of ``parameters``, where the master weights go, rounded; None where it is the same memory."""
        region = self.parameters[self.region.start : self.region.stop]
        return None if region.data_ptr() == self.master.data_ptr() else region

    def decay_runs(self) -> list[tuple[Interval, bool]]:
        """The region, cut into runs that decay and runs that do not; intervals count from the region's start."""
        runs, at = [], self.region.start
        for interval in (i.intersect(self.region) for i in self.undecayed):
            if not interval.size:
                continue
            stop = min(_align(interval.stop), self.region.stop)
            runs += [(Interval(at, interval.start), True), (Interval(interval.start, stop), False)]
            at = stop
        runs.append((Interval(at, self.region.stop), True))
        return [(run.shift(-self.region.start), decays) for run, decays in runs if run.size]


def _elements(spec: ParameterSpec, piece: Piece, start: int) -> Interval:
    """The elements of a piece in the bucket; replicated pieces are sliced by rows, so they are contiguous."""
    assert spec.shard_dim in (None, 0) or piece.replicas == 1 or len(spec.shape) == 1, spec.name
    width = spec.numel // spec.shape[spec.shard_dim or 0]
    return Interval(start + piece.local * width, start + (piece.local + piece.size) * width)


def _align(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT
