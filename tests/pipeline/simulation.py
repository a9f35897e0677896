"""What a schedule does, worked out on paper: the oracle of the tests of schedules.

`check` follows the complete lists, tensor by tensor. `play` says when each rank computes, from the orders alone.
Neither uses what the package works out about its own schedules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from megatron_lite.pipeline.instructions import COMPUTES, RECEIVES, SENDS, Instruction, Kind, Placement, Schedule

Cost = Mapping[Kind, int]
UNIT_COSTS: Cost = {Kind.FORWARD: 1, Kind.BACKWARD: 2, Kind.BACKWARD_INPUT: 1, Kind.BACKWARD_WEIGHT: 1}
Block = Sequence[Instruction]  # what a rank runs at the same time


class BadSchedule(AssertionError):
    pass


def require(condition: bool, message: str) -> None:
    if not condition:
        raise BadSchedule(message)


class Tensors:
    """What a rank has, and how often it may still be used."""

    def __init__(self, rank: int) -> None:
        self.rank, self.uses = rank, Counter[tuple[str, int, int]]()

    def make(self, what: str, chunk: int, m: int, uses: int = 1) -> None:
        require(self.uses[what, chunk, m] == 0, f"rank {self.rank}: {what} of {chunk}, {m} is made twice")
        self.uses[what, chunk, m] = uses

    def use(self, what: str, chunk: int, m: int) -> None:
        require(self.uses[what, chunk, m] > 0, f"rank {self.rank}: {what} of {chunk}, {m} is not there")
        self.uses[what, chunk, m] -= 1


def check(schedule: Schedule, with_backward: bool = True) -> list[int]:
    """The most activations (chunks times microbatches) that each rank holds. Raises BadSchedule where the lists are not
    a step: an instruction is missing, too many or out of order, a tensor is not there, or ranks wait for each other.

    A send ends when the other side comes to its receive: no schedule may need that it ends before.
    """
    placement, lists = schedule.placement, schedule.lists
    tensors = [Tensors(rank) for rank in range(len(lists))]
    places = [0] * len(lists)
    held, most_held = [0] * len(lists), [0] * len(lists)
    done: dict[tuple[int, str], list[int]] = {}
    moved = True
    while moved:
        moved = False
        for rank, instructions in enumerate(lists):
            while places[rank] < len(instructions):
                instruction = instructions[places[rank]]
                if instruction.kind in SENDS | RECEIVES:
                    kind, chunk, m = instruction
                    there = 1 if kind in (Kind.SEND_ACTIVATION, Kind.RECEIVE_GRADIENT) else -1
                    peer = placement.rank_of[chunk + there]
                    other = {
                        Kind.SEND_ACTIVATION: Kind.RECEIVE_ACTIVATION,
                        Kind.RECEIVE_ACTIVATION: Kind.SEND_ACTIVATION,
                        Kind.SEND_GRADIENT: Kind.RECEIVE_GRADIENT,
                        Kind.RECEIVE_GRADIENT: Kind.SEND_GRADIENT,
                    }[kind]
                    meets = lists[peer][places[peer] : places[peer] + 1]
                    if list(meets) != [Instruction(other, chunk + there, m)]:
                        break
                    places[peer] += 1
                    for one, (one_kind, one_chunk, _) in ((rank, instruction), (peer, meets[0])):
                        what = "activation" if "ACTIVATION" in one_kind.name else "gradient"
                        if one_kind in SENDS:
                            tensors[one].use(f"made {what}", one_chunk, m)
                        else:
                            tensors[one].make(f"{what} for", one_chunk, m)
                elif instruction.kind in COMPUTES:
                    held[rank] += _compute(instruction, placement, tensors[rank], done, with_backward)
                    most_held[rank] = max(most_held[rank], held[rank])
                else:
                    require(places[rank] == len(instructions) - 1, f"rank {rank} reduces before its last instruction")
                places[rank] += 1
                moved = True
    stuck = [f"rank {r} at {lists[r][place]}" for r, place in enumerate(places) if place < len(lists[r])]
    require(not stuck, f"deadlock: {'; '.join(stuck)}")
    in_order = list(range(schedule.num_microbatches))
    for chunk in range(placement.num_chunks):
        for part in ("forward", "input half", "weight half")[: 3 if with_backward else 1]:
            require(done.get((chunk, part), []) == in_order, f"chunk {chunk}: {part}s {done.get((chunk, part))}")
    for rank, of_rank in enumerate(tensors):
        require(not +of_rank.uses, f"rank {rank}: made and never used: {+of_rank.uses}")
        reduces = [instruction.kind for instruction in lists[rank]].count(Kind.REDUCE_GRADIENTS)
        require(reduces == int(with_backward), f"rank {rank} reduces {reduces} times")
    return most_held


def _compute(
    instruction: Instruction,
    placement: Placement,
    tensors: Tensors,
    done: dict[tuple[int, str], list[int]],
    with_backward: bool,
) -> int:
    """Runs a forward or a backward on a rank's tensors. How many activations more the rank holds after it."""
    kind, chunk, m = instruction
    last = placement.num_chunks - 1
    if kind is Kind.FORWARD:
        if chunk > 0:
            tensors.use("activation for", chunk, m)
        if chunk < last:
            local = placement.rank_of[chunk] == placement.rank_of[chunk + 1]
            tensors.make("activation for" if local else "made activation", chunk + local, m)
        if with_backward:
            tensors.make("saved activation", chunk, m)
        done.setdefault((chunk, "forward"), []).append(m)
        return int(with_backward)
    if kind is not Kind.BACKWARD_WEIGHT:
        tensors.use("saved activation", chunk, m)
        if chunk < last:
            tensors.use("gradient for", chunk, m)
        if chunk > 0:
            local = placement.rank_of[chunk] == placement.rank_of[chunk - 1]
            tensors.make("gradient for" if local else "made gradient", chunk - local, m)
        done.setdefault((chunk, "input half"), []).append(m)
        if kind is Kind.BACKWARD_INPUT:
            tensors.make("weight half", chunk, m)
            return 0
    else:
        tensors.use("weight half", chunk, m)
    done.setdefault((chunk, "weight half"), []).append(m)
    return -1


class Times(NamedTuple):
    """Per rank. Idle: the part of the time, of the step or from the rank's first start to its last end, in which the
    rank does not compute."""

    idle_of_step: list[int]
    idle_between: list[int]


def play(ranks: Sequence[Sequence[Block]], placement: Placement, cost: Cost = UNIT_COSTS) -> Times:
    """Runs blocks of instructions, each from the moment at which all that it needs is there, for the sum of its costs;
    what they make is there at the end of the block. Messages take no time."""
    ends: dict[tuple[str, int, int], int] = {}
    begins: list[list[int]] = [[] for _ in ranks]
    clocks, busy = [0] * len(ranks), [0] * len(ranks)
    moved = True
    while moved:
        moved = False
        for rank, blocks in enumerate(ranks):
            while len(begins[rank]) < len(blocks):
                block = blocks[len(begins[rank])]
                needs = [need for instruction in block for need in _needs(instruction, placement)]
                if any(need not in ends for need in needs):
                    break
                begins[rank].append(max([clocks[rank], *(ends[need] for need in needs)]))
                duration = sum(cost[instruction.kind] for instruction in block)
                clocks[rank] = begins[rank][-1] + duration
                busy[rank] += duration
                for kind, chunk, m in block:
                    if kind is not Kind.BACKWARD_WEIGHT:
                        ends["forward" if kind is Kind.FORWARD else "backward", chunk, m] = clocks[rank]
                moved = True
    require([len(b) for b in begins] == [len(r) for r in ranks], "deadlock")
    return Times(
        [max(clocks) - work for work in busy],
        [clock - begin[0] - work for clock, begin, work in zip(clocks, begins, busy, strict=True)],
    )


def _needs(instruction: Instruction, placement: Placement) -> list[tuple[str, int, int]]:
    kind, chunk, m = instruction
    if kind is Kind.FORWARD:
        return [("forward", chunk - 1, m)] if chunk > 0 else []
    if kind is Kind.BACKWARD_WEIGHT:
        return [("backward", chunk, m)]
    return [("forward", chunk, m), *([("backward", chunk + 1, m)] if chunk + 1 < placement.num_chunks else [])]


def computes(schedule: Schedule) -> list[list[Instruction]]:
    return [[instruction for instruction in ranks if instruction.kind in COMPUTES] for ranks in schedule.lists]
