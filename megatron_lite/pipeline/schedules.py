"""Pipeline schedules as data: per stage, the list of instructions of one step. Pure functions of integers.

Within a stage, forwards run in microbatch order and so do backwards, in every schedule: the gradients of a weight are
therefore added in the same order whatever the schedule and the number of stages, and the sum has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    FORWARD = "forward"
    BACKWARD = "backward"
    SEND_ACTIVATION = "send activation"
    RECEIVE_ACTIVATION = "receive activation"
    SEND_GRADIENT = "send gradient"
    RECEIVE_GRADIENT = "receive gradient"
    REDUCE_GRADIENTS = "reduce gradients"


@dataclass(frozen=True)
class Instruction:
    """One thing that a stage does. ``microbatch`` is -1 for what concerns the whole step."""

    kind: Kind
    microbatch: int = -1

    def __str__(self) -> str:
        return self.kind.value if self.microbatch < 0 else f"{self.kind.value} {self.microbatch}"


Schedule = list[Instruction]


def gpipe(num_stages: int, stage: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards (Huang et al. 2019). Holds the activations of every microbatch."""
    order = [(Kind.FORWARD, m) for m in range(num_microbatches)]
    order += [(Kind.BACKWARD, m) for m in range(num_microbatches)]
    return _with_communication(order, num_stages, stage)


def one_forward_one_backward(num_stages: int, stage: int, num_microbatches: int) -> Schedule:
    """1F1B (Narayanan et al. 2019, PipeDream-Flush): at most ``num_stages - stage`` microbatches are in flight."""
    warmup = min(num_stages - stage - 1, num_microbatches)
    order = [(Kind.FORWARD, m) for m in range(warmup)]
    for m in range(num_microbatches - warmup):
        order += [(Kind.FORWARD, warmup + m), (Kind.BACKWARD, m)]
    order += [(Kind.BACKWARD, m) for m in range(num_microbatches - warmup, num_microbatches)]
    return _with_communication(order, num_stages, stage)


def forward_only(num_stages: int, stage: int, num_microbatches: int) -> Schedule:
    """Evaluation: forwards in order; nothing is kept for a backward."""
    instructions = []
    for m in range(num_microbatches):
        instructions += _forward(num_stages, stage, m)
    return instructions


SCHEDULES: dict[str, Callable[[int, int, int], Schedule]] = {"gpipe": gpipe, "1f1b": one_forward_one_backward}


def _with_communication(order: list[tuple[Kind, int]], num_stages: int, stage: int) -> Schedule:
    """Puts the receives before and the sends behind each forward and backward, and the reduction at the end."""
    instructions: Schedule = []
    for kind, m in order:
        instructions += (_forward if kind is Kind.FORWARD else _backward)(num_stages, stage, m)
    return [*instructions, Instruction(Kind.REDUCE_GRADIENTS)]


def _forward(num_stages: int, stage: int, m: int) -> Schedule:
    receive = [Instruction(Kind.RECEIVE_ACTIVATION, m)] if stage > 0 else []
    send = [Instruction(Kind.SEND_ACTIVATION, m)] if stage < num_stages - 1 else []
    return [*receive, Instruction(Kind.FORWARD, m), *send]


def _backward(num_stages: int, stage: int, m: int) -> Schedule:
    receive = [Instruction(Kind.RECEIVE_GRADIENT, m)] if stage < num_stages - 1 else []
    send = [Instruction(Kind.SEND_GRADIENT, m)] if stage > 0 else []
    return [*receive, Instruction(Kind.BACKWARD, m), *send]
