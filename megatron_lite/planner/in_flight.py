"""What a schedule makes a rank hold at once, instruction by instruction. Pure integers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from megatron_lite.pipeline.instructions import COMPUTES, Instruction, Kind, Schedule

Counts = tuple[tuple[int, int], ...]  # (chunk, microbatches) for the chunks of a rank that have any


class Held(NamedTuple):
    """During one instruction. saved: microbatches of each chunk whose activations wait for a backward, the one in
    forward or in backward included. owed: those whose weight gradients are still to be computed, of schedules that
    split the backward. waiting: activations and gradients on their way from a chunk of this rank to the next one on it.
    in_backward: the chunk that is in backward, -1 if none is. splits: whether that is the first half of one; what it
    leaves owed takes the place of what was saved, and counts when it has ended."""

    saved: Counts
    owed: Counts
    waiting: int
    in_backward: int
    splits: bool = False


def held_by(schedule: Schedule, rank: int) -> frozenset[Held]:
    """All that a pipeline rank holds at some time in a step."""
    return frozenset(held for _, held in held_over_time(schedule, rank, at_end=False))


def held_over_time(schedule: Schedule, rank: int, *, at_end: bool) -> Iterator[tuple[Instruction, Held]]:
    """The instructions that compute, each with what a rank holds while it runs or, ``at_end``, when it has ended."""
    saved, owed, waiting = Counter[int](), Counter[int](), 0
    is_local = schedule.placement.is_local
    for instruction in schedule.lists[rank]:
        kind, chunk, _ = instruction
        if kind not in COMPUTES:
            continue
        is_forward, is_backward = kind is Kind.FORWARD, kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT)
        has_local_before = chunk > 0 and is_local(chunk - 1)
        saved[chunk] += is_forward
        splits = kind is Kind.BACKWARD_INPUT
        waiting += (is_forward or is_backward) * (is_local(chunk) if is_forward else has_local_before)
        waiting -= is_forward and has_local_before  # it is what this forward saves
        during = Held(_counts(saved), _counts(owed), waiting, chunk if is_backward else -1, splits)
        saved[chunk] -= is_backward
        owed[chunk] += splits - (kind is Kind.BACKWARD_WEIGHT)
        waiting -= is_backward and is_local(chunk)
        yield instruction, Held(_counts(saved), _counts(owed), waiting, -1) if at_end else during


def _counts(counter: Counter[int]) -> Counts:
    return tuple(sorted((chunk, count) for chunk, count in counter.items() if count))
