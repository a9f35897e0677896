"""Puts sends and receives between the forwards and backwards of all ranks, in one order that all of them keep.

The computing is played through at unit costs (forward 1, each half of a backward 1). A message stands at the moment at
which its tensor is ready, in the lists of both ends. Every rank's list is then a part of one order in time, so no two
ranks can wait for each other: not where a send ends at once, not where it ends when the other side receives, and not
where all of a rank's messages pass through one queue. A receive stands as early as the message can come, which is not
later than, and often before, the computing in front of its use: there the transfer runs while the rank computes.

A large pipeline has hundreds of thousands of instructions, so what is known of each of them lies in lists of integers.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lite.pipeline.instructions import Instruction, InstructionList, Kind, Placement, ScheduleError

UNIT_COSTS = {Kind.FORWARD: 1, Kind.BACKWARD: 2, Kind.BACKWARD_INPUT: 1, Kind.BACKWARD_WEIGHT: 1}

# What the loops over all instructions look up most; the costs that are not here are 1.
_FORWARD, _BACKWARD, _WEIGHT = Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_WEIGHT
_BACKWARD_COST = UNIT_COSTS[Kind.BACKWARD]


def with_communication(orders: Sequence[Sequence[Instruction]], placement: Placement) -> tuple[InstructionList, ...]:
    """The complete lists of all ranks from the order in which each computes.

    Raises ScheduleError where the orders wait for each other, or use what nobody makes.
    """
    starts = start_times(orders, placement)
    num_chunks, num_microbatches = placement.num_chunks, _num_microbatches(orders)
    receiver_of_activation, receiver_of_gradient = _receivers(placement)
    # A rank's list by place in the one order of all ranks: time, messages before computing, chunk, microbatch.
    lists: list[dict[int, Instruction]] = [{} for _ in orders]
    for rank, order in enumerate(orders):
        own = lists[rank]
        for instruction, start in zip(order, starts[rank], strict=True):
            kind, chunk, m = instruction
            own[((2 * start + 1) * num_chunks + chunk) * num_microbatches + m] = instruction
            if kind is _FORWARD:
                receiver = receiver_of_activation[chunk]
                if receiver >= 0:
                    place = (2 * (start + 1) * num_chunks + chunk) * num_microbatches + m
                    own[place] = Instruction(Kind.SEND_ACTIVATION, chunk, m)
                    lists[receiver][place] = Instruction(Kind.RECEIVE_ACTIVATION, chunk + 1, m)
            elif kind is not _WEIGHT:
                receiver = receiver_of_gradient[chunk]
                if receiver >= 0:
                    end = start + (_BACKWARD_COST if kind is _BACKWARD else 1)
                    place = (2 * end * num_chunks + chunk) * num_microbatches + m
                    own[place] = Instruction(Kind.SEND_GRADIENT, chunk, m)
                    lists[receiver][place] = Instruction(Kind.RECEIVE_GRADIENT, chunk - 1, m)
    has_backward = any(instruction.kind is not _FORWARD for order in orders for instruction in order)
    reduce = [Instruction(Kind.REDUCE_GRADIENTS)] if has_backward else []
    return tuple((*(placed[place] for place in sorted(placed)), *reduce) for placed in lists)


def _receivers(placement: Placement) -> tuple[list[int], list[int]]:
    """By chunk, the rank that waits for its output, and the one that waits for the gradient of its input. -1: none."""
    last = placement.num_chunks - 1
    is_sent = [chunk < last and not placement.is_local(chunk) for chunk in range(placement.num_chunks)]
    of_activation = [placement.rank_of[chunk + 1] if is_sent[chunk] else -1 for chunk in range(placement.num_chunks)]
    of_gradient = [-1, *(placement.rank_of[chunk] if is_sent[chunk] else -1 for chunk in range(last))]
    return of_activation, of_gradient


def start_times(orders: Sequence[Sequence[Instruction]], placement: Placement) -> list[list[int]]:
    """When each instruction of each rank starts, at unit costs, if nothing but data makes a rank wait.

    Raises ScheduleError where ranks wait for each other.
    """
    num_microbatches, last = _num_microbatches(orders), placement.num_chunks - 1
    # When a forward, and a backward's input half, has ended, by chunk and microbatch. Before: -1, or -2 - rank where a
    # rank waits for it.
    forward_ends = [[-1] * num_microbatches for _ in range(placement.num_chunks)]
    input_ends = [[-1] * num_microbatches for _ in range(placement.num_chunks)]
    no_input = [0] * num_microbatches
    starts: list[list[int]] = [[] for _ in orders]
    clocks = [0] * len(orders)
    can_run = list(range(len(orders)))
    while can_run:
        rank = can_run.pop()
        times, clock = starts[rank], clocks[rank]
        order = orders[rank]
        for place in range(len(times), len(order)):
            kind, chunk, m = order[place]
            if kind is _FORWARD:
                needed = forward_ends[chunk - 1] if chunk > 0 else no_input
                made, cost = forward_ends[chunk], 1
            elif kind is _WEIGHT:
                needed, made, cost = input_ends[chunk], None, 1
            else:
                needed = input_ends[chunk + 1] if chunk < last and forward_ends[chunk][m] >= 0 else forward_ends[chunk]
                made, cost = input_ends[chunk], _BACKWARD_COST if kind is _BACKWARD else 1
            ready = needed[m]
            if ready < 0:
                needed[m] = -2 - rank
                break
            if ready > clock:
                clock = ready
            times.append(clock)
            clock += cost
            if made is not None:
                if made[m] < -1:
                    can_run.append(-2 - made[m])
                made[m] = clock
        clocks[rank] = clock
    stuck = [
        f"rank {rank} waits at {order[len(times)]} for {_missing(order[len(times)], forward_ends)}"
        for rank, (order, times) in enumerate(zip(orders, starts, strict=True))
        if len(times) < len(order)
    ]
    if stuck:
        raise ScheduleError("the order of computing never ends: " + "; ".join(stuck))
    return starts


def _missing(instruction: Instruction, forward_ends: Sequence[Sequence[int]]) -> Instruction:
    """What an instruction that cannot start waits for."""
    kind, chunk, m = instruction
    if kind is Kind.FORWARD:
        return Instruction(Kind.FORWARD, chunk - 1, m)
    if kind is Kind.BACKWARD_WEIGHT:
        return Instruction(Kind.BACKWARD_INPUT, chunk, m)
    if forward_ends[chunk][m] < 0:
        return Instruction(Kind.FORWARD, chunk, m)
    return Instruction(Kind.BACKWARD_INPUT, chunk + 1, m)


def _num_microbatches(orders: Sequence[Sequence[Instruction]]) -> int:
    return 1 + max((instruction.microbatch for order in orders for instruction in order), default=0)
