"""The order in which each rank computes, for schedules that go down the ranks and up again.

Rank r of p holds chunk r on the way down, here ``down``, and chunk 2p - 1 - r on the way up, here ``up``. The first and
the last chunk are on rank 0: its backward can begin as soon as a microbatch has come back. m: number of microbatches.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence

from megatron_lite.pipeline.instructions import Instruction, Kind, Placement
from megatron_lite.pipeline.orders import Order

# What a rank does next, and on which chunk: on the next microbatch of that chunk, or, for a weight half, on what waits
# longest for it.
Step = tuple[Kind, int]
OLDEST_WEIGHT: Step = (Kind.BACKWARD_WEIGHT, -1)


def zb_v(placement: Placement, num_microbatches: int) -> list[Order]:
    """ZB-V (Qi et al. 2024, section 6): from 2p - 1 microbatches on, no rank waits once it has begun; none ever holds
    the activations of more than 2p chunks, as in 1F1B.

    Forwards and input halves stand in a fixed order: after the warm-up, an input half for each forward, of ``up`` alone
    until ``down`` can begin, then of the two chunks in turn. Weight halves fill the places where, at unit costs, a rank
    would wait, or would hold more.
    """
    num_ranks = placement.num_ranks
    orders = []
    for rank in range(num_ranks):
        down, up = placement.chunks_of(rank)
        steps = _warm_up(rank, num_ranks, down, up)
        steps += [(Kind.BACKWARD_INPUT, up), (Kind.FORWARD, up)] * (num_ranks - rank - 1)
        both = [(Kind.BACKWARD_INPUT, up), (Kind.FORWARD, down), (Kind.BACKWARD_INPUT, down), (Kind.FORWARD, up)]
        orders.append(_numbered(steps + both * num_microbatches, num_microbatches))
    return _with_weight_halves(orders, placement, most_held=2 * num_ranks)


def dualpipe_v(placement: Placement, num_microbatches: int) -> list[Order]:
    """DualPipe cut in half (DeepSeek-AI 2025, github.com/deepseek-ai/DualPipe): one chunk's forward beside the other's
    backward, for a runner that overlaps the two. Holds the activations of at most 2p + 1 chunks.

    Backwards are whole, but for those that fill the pipeline and those that drain it. The order is made for 2p
    microbatches or more; of fewer, it is that of 2p without the others.
    """
    num_ranks = placement.num_ranks
    orders = []
    for rank in range(num_ranks):
        down, up = placement.chunks_of(rank)
        after = num_ranks - rank - 1  # ranks
        num_both = max(num_microbatches, 2 * num_ranks) - 2 * num_ranks + rank + 1
        forward, backward = (Kind.FORWARD, down), (Kind.BACKWARD, up)
        steps = _warm_up(rank, num_ranks, down, up)
        steps += [(Kind.BACKWARD_INPUT, up), OLDEST_WEIGHT, (Kind.FORWARD, up)] * after
        steps += [forward, backward, (Kind.FORWARD, up), (Kind.BACKWARD, down)] * num_both
        steps += [backward, (Kind.FORWARD, up), (Kind.BACKWARD, down)] * after
        # Only backwards are left: the first rank + 1 of them whole, the others leave their weights for the gaps.
        ending = [up, down] * (rank + 1)
        steps += [(Kind.BACKWARD, chunk) for chunk in ending[: rank + 1]]
        steps += [(Kind.BACKWARD_INPUT, chunk) for chunk in ending[rank + 1 :]]
        steps += [OLDEST_WEIGHT, (Kind.BACKWARD_INPUT, down)] * after
        steps += [OLDEST_WEIGHT] * (rank + 1)
        orders.append(_numbered(steps, num_microbatches))
    return orders


def _warm_up(rank: int, num_ranks: int, down: int, up: int) -> list[Step]:
    """2p forwards: ``down`` alone until its first microbatch comes back, then the two chunks in turn."""
    alone, both = [(Kind.FORWARD, down)], [(Kind.FORWARD, down), (Kind.FORWARD, up)]
    return alone * (2 * (num_ranks - rank - 1)) + both * (rank + 1)


def _numbered(steps: Iterable[Step], num_microbatches: int) -> Order:
    """The steps with their microbatches, without those that would be of more than there are."""
    order = []
    count: Counter[Step] = Counter()
    owed: deque[tuple[int, int]] = deque()  # weight halves
    for step in steps:
        kind, chunk = step
        if kind is Kind.BACKWARD_WEIGHT:
            chunk, m = owed.popleft()
        else:
            half = (Kind.FORWARD, chunk) if kind is Kind.FORWARD else (Kind.BACKWARD, chunk)
            m = count[half]
            count[half] += 1
            if kind is Kind.BACKWARD_INPUT:
                owed.append((chunk, m))
        if m < num_microbatches:
            order.append(Instruction(kind, chunk, m))
    return order


def _with_weight_halves(orders: Sequence[Order], placement: Placement, most_held: int) -> list[Order]:
    """Plays forwards and input halves through, one unit of time after the other, and adds the weight halves.

    A weight half runs where the next instruction of the rank's order cannot: its tensor is not there yet, or it is a
    forward and the rank holds the activations of ``most_held`` chunks.
    """
    filled: list[Order] = [[] for _ in orders]
    todo = [deque(order) for order in orders]
    owed: list[deque[Instruction]] = [deque() for _ in orders]
    held = [0] * len(orders)
    num_forwards, num_inputs = [0] * placement.num_chunks, [0] * placement.num_chunks

    def can_run(rank: int, instruction: Instruction) -> bool:
        kind, chunk, m = instruction
        if kind is Kind.FORWARD:
            return held[rank] < most_held and (chunk == 0 or num_forwards[chunk - 1] > m)
        return num_forwards[chunk] > m and (chunk + 1 == placement.num_chunks or num_inputs[chunk + 1] > m)

    while any(todo) or any(owed):
        # All ranks choose before any of them has run: each from the rank's own order, or from what it owes, or nothing.
        chosen = [queue if queue and can_run(rank, queue[0]) else owed[rank] for rank, queue in enumerate(todo)]
        for rank, queue in enumerate(chosen):
            if not queue:
                continue
            instruction = queue.popleft()
            filled[rank].append(instruction)
            kind, chunk, m = instruction
            if kind is Kind.FORWARD:
                num_forwards[chunk] += 1
                held[rank] += 1
            elif kind is Kind.BACKWARD_INPUT:
                num_inputs[chunk] += 1
                owed[rank].append(Instruction(Kind.BACKWARD_WEIGHT, chunk, m))
            else:
                held[rank] -= 1
    return filled
