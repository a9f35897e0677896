"""Which hyper-rectangles of the global tensors lie in a rank's memory. Pure geometry: views, never copies.

ZeRO keeps parameters in flat memory, and its slices begin and end anywhere in a parameter. The elements of a flat
interval of a matrix are at most three rectangles: the rest of a row, whole rows, the beginning of a row. Each of them
is then cut along the sharded dimension into the pieces of the global tensor that the rank holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.models.identity import ParameterSpec


@dataclass(frozen=True)
class Chunk:
    """A hyper-rectangle of a global tensor: where it begins there, and a view of this rank's memory that holds it."""

    offsets: tuple[int, ...]
    values: Tensor

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self.values.shape)


@dataclass(frozen=True)
class GlobalTensor:
    """What this rank holds of a tensor that has the same name and shape on every rank; perhaps nothing."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Box:
    """A hyper-rectangle: where it begins, and its extent along each dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(offset + size for offset, size in zip(self.offsets, self.sizes, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """The common part; None where there is none."""
        offsets = tuple(map(max, self.offsets, other.offsets))
        sizes = tuple(end - offset for end, offset in zip(map(min, self.ends, other.ends), offsets, strict=True))
        return Box(offsets, sizes) if all(size > 0 for size in sizes) else None


def flat_boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, Box]]:
    """Elements ``[start, stop)`` of a row-major tensor as boxes that are contiguous in it, in order.

    Yields (position of the box's first element, box): for a vector one, for a matrix up to three, and two more for
    each further dimension.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield start, Box((start,) * len(shape), (stop - start,) * len(shape))
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), stop // inner  # whole rows
    if start % inner:
        end = min(stop, first * inner)
        yield from _within_row(shape, first - 1, start, end)
    if first < last:
        zeros = (0,) * (len(shape) - 1)
        yield first * inner, Box((first, *zeros), (last - first, *shape[1:]))
    if stop % inner and last >= first:
        yield from _within_row(shape, last, last * inner, stop)


def _within_row(shape: Sequence[int], row: int, start: int, stop: int) -> Iterator[tuple[int, Box]]:
    begin = row * math.prod(shape[1:])
    for at, box in flat_boxes(shape[1:], start - begin, stop - begin):
        yield begin + at, Box((row, *box.offsets), (1, *box.sizes))


def chunks_of(
    spec: ParameterSpec, tp: int, tp_index: int, flat: Tensor, first: int, *, owned_only: bool = False
) -> list[Chunk]:
    """The chunks of a parameter in a flat interval of a tensor-parallel rank's shard.

    flat: ``[n]``, elements ``[first, first + n)`` of the flattened shard, padding included; the chunks are views of it.
    owned_only: leaves out what an earlier tp rank holds too (a replicated key-value head, a parameter that tp does not
        slice), so that all ranks together have each element once. For saving; loading fills every replica.

    Rows that only pad the vocabulary are in no chunk.
    """
    shard = spec.shard(tp, tp_index)
    dim = spec.shard_dim or 0
    chunks = []
    for at, box in flat_boxes(shard.shape, first, first + flat.numel()):
        values = flat[at - first : at - first + box.numel].view(box.sizes)
        for piece in shard.pieces:
            if owned_only and not piece.is_first_replica:
                continue
            start, stop = max(piece.local, box.offsets[dim]), min(piece.local + piece.size, box.ends[dim])
            if start < stop:
                place = piece.start + start - piece.local
                offsets = (*box.offsets[:dim], place, *box.offsets[dim + 1 :])
                chunks.append(Chunk(offsets, values.narrow(dim, start - box.offsets[dim], stop - start)))
    return chunks


def chunks_in_memory(
    spec: ParameterSpec,
    tp: int,
    tp_index: int,
    memory: Tensor,
    *,
    memory_start: int,
    shard_start: int,
    owned_only: bool = False,
) -> list[Chunk]:
    """`chunks_of` for a shard that lies in a larger flat address space, such as a bucket, of which a part is at hand.

    memory: ``[n]``, the elements ``[memory_start, memory_start + n)`` of that space.
    shard_start: where the flattened shard begins in it.
    """
    size = math.prod(spec.shard(tp, tp_index).shape)
    start = max(memory_start, shard_start)
    stop = min(memory_start + memory.numel(), shard_start + size)
    if start >= stop:
        return []
    flat = memory[start - memory_start : stop - memory_start]
    return chunks_of(spec, tp, tp_index, flat, start - shard_start, owned_only=owned_only)


def tiling_problem(shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """Why the boxes do not cover a tensor exactly once; None if they do."""
    whole = Box((0,) * len(shape), tuple(shape))
    for box in boxes:
        if len(box.sizes) != len(shape) or min((0, *box.offsets, *box.sizes)) < 0:
            return f"a chunk at {list(box.offsets)} of {list(box.sizes)} is not of a tensor of {list(shape)}"
        if any(end > size for end, size in zip(box.ends, shape, strict=True)):
            return f"a chunk at {list(box.offsets)} of {list(box.sizes)} ends outside of {list(shape)}"
    dim = max(range(len(shape)), key=lambda d: len({box.offsets[d] for box in boxes}), default=0)
    active: list[Box] = []
    for box in sorted((box for box in boxes if box.numel), key=lambda box: box.offsets[dim : dim + 1]):
        active = [other for other in active if not shape or other.ends[dim] > box.offsets[dim]]
        for other in active:
            if not shape or box.intersect(other) is not None:
                return f"chunks at {list(other.offsets)} and {list(box.offsets)} overlap"
        active.append(box)
    covered = sum(box.numel for box in boxes)
    if covered != whole.numel:
        return f"its chunks hold {covered:,} of its {whole.numel:,} elements"
    return None
