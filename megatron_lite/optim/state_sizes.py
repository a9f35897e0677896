"""Which elements of a bucket an optimizer keeps state for, by kind of state. Pure integers, for memory and for plans.

A kind of state is one flat tensor a region, in the dtype of master weights. Where all parameters of a bucket have it,
it is as long as the region, padding included; where only some have, it holds their elements, one behind the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megatron_lite.config.optim import OptimConfig


class SlotLike(Protocol):
    """Where a parameter lies in its bucket: its name, its local shape, its first element."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def start(self) -> int: ...


def is_hidden_matrix(parameter: str, shape: Sequence[int]) -> bool:
    """Whether Muon orthogonalizes a parameter: the matrices of layers; not embeddings, head, norms and biases."""
    return parameter.startswith("layers.") and len(shape) == 2


def state_kinds(optim: OptimConfig, parameter: str, shape: Sequence[int]) -> tuple[str, ...]:
    """The kinds of state of a parameter: ``first`` is a mean (or sum) of gradients, ``second`` one of their squares."""
    if optim.name == "sgd":
        return ("first",) if optim.momentum else ()
    if optim.name == "lion" or (optim.name == "muon" and is_hidden_matrix(parameter, shape)):
        return ("first",)
    return ("first", "second")


def state_intervals(
    optim: OptimConfig, slots: Sequence[SlotLike], start: int, stop: int
) -> dict[str, tuple[tuple[int, int], ...]]:
    """The elements ``[begin, end)`` of a bucket's region ``[start, stop)`` that each kind of state holds, in order.

    slots: of the bucket, in order; what pads behind a slot belongs to it. Neighbouring intervals are one. A kind that
    some parameter of the bucket has is there, also where none of its elements lies in the region.
    """
    ends = [*(slot.start for slot in slots[1:]), stop]
    found: dict[str, list[tuple[int, int]]] = {}
    for slot, slot_stop in zip(slots, ends, strict=True):
        begin, end = max(slot.start, start), min(slot_stop, stop)
        for kind in state_kinds(optim, slot.name, slot.shape):
            intervals = found.setdefault(kind, [])
            if begin < end and intervals and intervals[-1][1] == begin:
                intervals[-1] = (intervals[-1][0], end)
            elif begin < end:
                intervals.append((begin, end))
    return {kind: tuple(intervals) for kind, intervals in found.items()}


def state_elements(optim: OptimConfig, slots: Sequence[SlotLike], start: int, stop: int) -> dict[str, int]:
    """How many elements, in the dtype of master weights, each kind of state has in a bucket's region."""
    intervals = state_intervals(optim, slots, start, stop)
    return {kind: sum(end - begin for begin, end in found) for kind, found in intervals.items()}
