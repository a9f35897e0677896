"""The order in which each rank computes, for schedules that go around the loop of ranks once for each virtual stage.

Each function maps a placement and a number of microbatches, from 1 up, to one list a rank. In formulas, p is the number
of ranks, r a rank, v the number of virtual stages, m the number of microbatches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from megatron_lite.pipeline.instructions import Instruction, Kind, Placement

Order = list[Instruction]


def forwards(placement: Placement, num_microbatches: int) -> list[Order]:
    """Every chunk's forwards, the first chunk's first."""
    return [
        [Instruction(Kind.FORWARD, chunk, m) for chunk in placement.chunks_of(rank) for m in range(num_microbatches)]
        for rank in range(placement.num_ranks)
    ]


def breadth_first(placement: Placement, num_microbatches: int) -> list[Order]:
    """All forwards, then all backwards: GPipe (Huang et al. 2019); with virtual stages, breadth-first (Lamy-Poirier
    2023, arXiv:2211.05953).

    Each chunk takes every microbatch before the next chunk's turn. Holds the activations of all microbatches.
    """
    orders = forwards(placement, num_microbatches)
    for rank, order in enumerate(orders):
        chunks = reversed(placement.chunks_of(rank))
        order += [Instruction(Kind.BACKWARD, chunk, m) for chunk in chunks for m in range(num_microbatches)]
    return orders


def one_forward_one_backward(placement: Placement, num_microbatches: int) -> list[Order]:
    """1F1B (Narayanan et al. 2019, PipeDream-Flush): at most p - r microbatches are in flight."""
    return _alternating(placement, num_microbatches, ahead=1)


def eager_one_forward_one_backward(placement: Placement, num_microbatches: int) -> list[Order]:
    """1F1B that runs 2(p - r) - 1 forwards ahead instead of p - r (Zhuang et al. 2023, arXiv:2211.05322, section 4).

    A tensor then has the time of a forward and a backward to reach the neighbour before it is used.
    """
    return _alternating(placement, num_microbatches, ahead=2)


def interleaved(placement: Placement, num_microbatches: int) -> list[Order]:
    """1F1B over v chunks a rank (Narayanan et al. 2021, section 2.2): the bubble is v times shorter.

    With one chunk it is 1F1B. With more, 2(p - r) - 1 + (v - 1)p chunks' activations are held where p divides m.
    """
    return _alternating(placement, num_microbatches, ahead=2 if placement.num_chunks > placement.num_ranks else 1)


def zb_h1(placement: Placement, num_microbatches: int) -> list[Order]:
    """1F1B with the weight halves put off until every rank holds as much as rank 0 (Qi et al. 2024, section 2.1)."""
    return _alternating(placement, num_microbatches, ahead=1, split=True)


def zb_h2(placement: Placement, num_microbatches: int) -> list[Order]:
    """As `zb_h1`, with a warm-up long enough that no rank waits once it has begun (Qi et al. 2024, section 2.2)."""
    return _alternating(placement, num_microbatches, ahead=2, split=True)


def _alternating(placement: Placement, num_microbatches: int, *, ahead: int, split: bool = False) -> list[Order]:
    """Forwards to warm up, then a forward and a backward in turn, then the backwards that are left.

    ahead: how many more forwards a rank runs before its first backward than the rank after it. 1 is what data asks for.
    split: the input half of a backward runs at once, its weight half ``ahead * rank`` backwards later: a rank starts
    so much earlier than the ones after it, and holds as much less, that all hold the same.
    """
    orders = []
    groups = _groups(placement.num_ranks, num_microbatches)
    for rank in range(placement.num_ranks):
        chunks = placement.chunks_of(rank)
        forward = list(_in_groups(chunks, groups))
        backward = list(_in_groups(chunks[::-1], groups))
        # The last rank begins its last chunk after all others have taken the first group.
        warmup = ahead * (placement.num_ranks - rank - 1) + (len(chunks) - 1) * len(groups[0])
        put_off = ahead * rank
        order = [Instruction(Kind.FORWARD, *work) for work in forward[:warmup]]
        for i, work in enumerate(backward):
            if warmup + i < len(forward):
                order.append(Instruction(Kind.FORWARD, *forward[warmup + i]))
            order.append(Instruction(Kind.BACKWARD_INPUT if split else Kind.BACKWARD, *work))
            if split and i >= put_off:
                order.append(Instruction(Kind.BACKWARD_WEIGHT, *backward[i - put_off]))
        if split:
            order += [Instruction(Kind.BACKWARD_WEIGHT, *work) for work in backward[max(0, len(backward) - put_off) :]]
        orders.append(order)
    return orders


def _groups(num_ranks: int, num_microbatches: int) -> list[range]:
    """Microbatches that go through a rank's chunks together, the larger groups first.

    A group comes back from the last rank to the first without a gap where it has at least as many microbatches as there
    are ranks, and each microbatch more is one more to hold: groups of p where p divides m, else of p to 2p - 1.
    """
    count = max(1, num_microbatches // num_ranks)
    size, larger = divmod(num_microbatches, count)
    starts = [i * size + min(i, larger) for i in range(count + 1)]
    return [range(start, end) for start, end in pairwise(starts)]


def _in_groups(chunks: Sequence[int], groups: Sequence[range]) -> Iterator[tuple[int, int]]:
    """(chunk, microbatch): every chunk takes a group before the next group comes."""
    return ((chunk, m) for group in groups for chunk in chunks for m in group)
