"""One flat bucket: parameters, gradients and master weights of a unit, as contiguous memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_lite.models.identity import ParameterSpec, Piece
from megatron_lite.zero.gradients import Gradients
from megatron_lite.zero.offload import Resident, StoredTensor, mapped
from megatron_lite.zero.partition import ALIGNMENT, BucketLayout, Interval, merge

# (category, name, number of elements, dtype) -> a tensor of zeros; category: optimizer, gradients or parameters.
Keep = Callable[[str, str, int, torch.dtype], StoredTensor]


@dataclass(frozen=True)
class MemoryPlan:
    """What is whole on a rank and what is a slice, and in which dtypes.

    stage: see `parallel.zero_stage`. num_shards, shard_index: of the slices. share_index: this rank's among all slices
    of a bucket's layout. reduces_each_microbatch: gradients are summed over ranks in each microbatch, and not once.
    """

    stage: int
    num_shards: int
    shard_index: int
    share_index: int
    param_dtype: torch.dtype
    master_dtype: torch.dtype
    grad_dtype: torch.dtype
    reduces_each_microbatch: bool = False

    @property
    def keeps_whole_gradients(self) -> bool:
        """Whether a rank's own gradients lie whole in memory that stays."""
        return self.stage < 2 and not self.reduces_each_microbatch


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
    """Flat memory of a unit.

    slice: this rank's of those that the ranks of ``mesh.shard`` hold. region: what this rank updates: the whole
    (stage 0) or its slice. share: the part of it that this rank counts and saves, one of as many as dp has ranks.

    parameters: those of the model, by name, views of ``flat``.
    flat: ``[size]`` in the compute dtype; at stage 3 its memory is there while the bucket is whole (`gather.py`).
    gradients: this rank's own, whole.
    stored: what lasts from step to step, each ``[region]``, by kind: ``values``, the parameters in the compute dtype (a
    view of ``flat``, or at stage 3 this rank's own); ``master``, where its dtype is another one; ``sums``, the gradient
    summed over ranks, once a step has reduced it.
    uncounted: elements that another rank, or the parameter that this one is tied to, counts in the gradient norm.
    undecayed: elements without weight decay.
    """

    def __init__(
        self,
        layout: BucketLayout,
        memory: MemoryPlan,
        *,
        device: torch.device,
        shared_with: Bucket | None,
        keep: Keep | None = None,
    ) -> None:
        """keep: makes what may lie elsewhere than on the device; None: nothing does."""
        self.layout, self.memory, self.shared_with = layout, memory, shared_with
        self.slice = layout.slice(memory.shard_index, memory.num_shards)
        self.region = layout.whole if memory.stage == 0 else self.slice
        self.share = layout.slice(memory.share_index)
        self.stored: dict[str, StoredTensor] = {}
        keep = keep or (lambda category, name, numel, dtype: Resident(torch.zeros(numel, dtype=dtype, device=device)))
        if shared_with is None:
            self.flat = torch.zeros(layout.size, dtype=memory.param_dtype, device=device)
            self.stored["values"] = Resident(self.flat[self.region.start : self.region.stop])
            if memory.stage == 3:
                self.stored["values"] = keep(
                    "parameters", f"{layout.name}.values", self.region.size, memory.param_dtype
                )
            if memory.param_dtype != memory.master_dtype:
                self.stored["master"] = keep(
                    "optimizer", f"{layout.name}.master", self.region.size, memory.master_dtype
                )
        else:
            self.flat = shared_with.flat
            self.flat.untyped_storage().resize_(self.flat.nbytes)  # views are made of memory that is there
        self.parameters = {
            slot.name: _parameter_in(self.flat[slot.interval.start : slot.interval.stop].view(slot.shape))
            for slot in layout.slots
        }
        if memory.stage == 3:
            self.flat.untyped_storage().resize_(0)
        self.gradients = Gradients(
            layout, self.parameters, memory.grad_dtype, device, is_kept=memory.keeps_whole_gradients
        )
        if memory.keeps_whole_gradients:
            self.stored["sums"] = Resident(self.gradients.kept[self.region.start : self.region.stop])
        else:
            self.stored["sums"] = keep("gradients", f"{layout.name}.sums", self.region.size, memory.grad_dtype)
        self.partial_sums: list[PartialSum] = []
        self.uncounted: list[Interval] = []
        self.undecayed: list[Interval] = []

    @property
    def values(self) -> Tensor:
        return mapped(self.owner.stored["values"])

    @property
    def master(self) -> Tensor:
        return mapped(self.owner.stored[self.weights_kind])

    @property
    def sums(self) -> Tensor:
        return mapped(self.stored["sums"])

    @property
    def weights_kind(self) -> str:
        """What the optimizer updates: ``master``, or ``values`` where no other dtype is kept."""
        return "master" if self.memory.param_dtype != self.memory.master_dtype else "values"

    @property
    def owner(self) -> Bucket:
        """The bucket with the memory of the parameters: this one, or that which a tied table shares."""
        return self.shared_with or self

    def fill(self, weights: Callable[[str], Tensor]) -> None:
        """Sets parameters and master weights. weights: a parameter's values on this tp rank, by name."""
        master, values = self.master, self.values
        for slot in self.layout.slots:
            found = weights(slot.name).flatten().to(device=self.flat.device, dtype=self.memory.master_dtype)
            here = slot.interval.intersect(self.region)
            if here.size:
                part = found[here.start - slot.start : here.stop - slot.start]
                master[here.start - self.region.start : here.stop - self.region.start] = part
                values[here.start - self.region.start : here.stop - self.region.start] = part
            if self.memory.stage < 3:
                self.flat[slot.interval.start : slot.interval.stop] = found

    def slice_sums(self) -> Tensor:
        """The part of ``sums`` that is this rank's slice."""
        own = self.slice.shift(-self.region.start)
        return self.sums[own.start : own.stop]

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


def _parameter_in(memory: Tensor) -> nn.Parameter:
    """A parameter on this memory. What is written to the memory does not look to autograd as if it had changed."""
    parameter = nn.Parameter(memory.new_empty(0))
    parameter.data = memory
    return parameter


def _elements(spec: ParameterSpec, piece: Piece, start: int) -> Interval:
    """The elements of a piece in the bucket; replicated pieces are sliced by rows, so they are contiguous."""
    assert spec.shard_dim in (None, 0) or piece.replicas == 1 or len(spec.shape) == 1, spec.name
    width = spec.numel // spec.shape[spec.shard_dim or 0]
    return Interval(start + piece.local * width, start + (piece.local + piece.size) * width)


def _align(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT
