"""Executes the instruction lists of all stages on paper, and finds what is wrong with them.

Sends never wait, and a stage receives the tensors of a neighbour in the order in which they were sent. What ordered
streams do to the same lists is in test_ordered_streams.py.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from megatron_lite.pipeline.schedules import Kind, Schedule


class BadSchedule(AssertionError):
    pass


def require(condition: bool, message: str) -> None:
    if not condition:
        raise BadSchedule(message)


@dataclass
class Stage:
    schedule: Schedule
    place: int = 0
    activations_in: set[int] = field(default_factory=set)
    outputs: set[int] = field(default_factory=set)  # made by a forward, kept for its backward
    unsent_outputs: set[int] = field(default_factory=set)
    gradients_in: set[int] = field(default_factory=set)
    unsent_gradients: set[int] = field(default_factory=set)
    forwards: list[int] = field(default_factory=list)
    backwards: list[int] = field(default_factory=list)
    most_in_flight: int = 0
    reductions: int = 0


def _move(tensors: set[int], m: int, what: str) -> None:
    require(m in tensors, f"{what} {m} is not there")
    tensors.remove(m)


def simulate(schedules: list[Schedule], num_microbatches: int, with_backward: bool = True) -> list[int]:
    """The most microbatches that each stage holds between forward and backward. Raises BadSchedule."""
    stages = [Stage(schedule) for schedule in schedules]
    last = len(stages) - 1
    forward_wires: list[deque[int]] = [deque() for _ in stages]  # into stage s from s - 1
    backward_wires: list[deque[int]] = [deque() for _ in stages]  # into stage s from s + 1

    def receive(wire: deque[int], m: int) -> bool:
        if not wire:
            return False
        require(wire[0] == m, f"receives {m}, but {wire[0]} comes first")
        wire.popleft()
        return True

    def execute(s: int, kind: Kind, m: int) -> bool:
        """False if the stage has to wait."""
        stage = stages[s]
        if kind is Kind.RECEIVE_ACTIVATION:
            require(s > 0, "the first stage receives tokens, not activations")
            if not receive(forward_wires[s], m):
                return False
            stage.activations_in.add(m)
        elif kind is Kind.FORWARD:
            if s > 0:
                _move(stage.activations_in, m, "activation")
            stage.forwards.append(m)
            if with_backward:
                stage.outputs.add(m)
                stage.most_in_flight = max(stage.most_in_flight, len(stage.outputs))
            if s < last:
                stage.unsent_outputs.add(m)
        elif kind is Kind.SEND_ACTIVATION:
            _move(stage.unsent_outputs, m, "output")
            forward_wires[s + 1].append(m)
        elif kind is Kind.RECEIVE_GRADIENT:
            if not receive(backward_wires[s], m):
                return False
            stage.gradients_in.add(m)
        elif kind is Kind.BACKWARD:
            _move(stage.outputs, m, "output of the forward of")
            if s < last:
                _move(stage.gradients_in, m, "gradient")
            stage.backwards.append(m)
            if s > 0:
                stage.unsent_gradients.add(m)
        elif kind is Kind.SEND_GRADIENT:
            _move(stage.unsent_gradients, m, "gradient")
            backward_wires[s - 1].append(m)
        else:
            require(stage.place == len(stage.schedule) - 1, "gradients are reduced before the last of them is there")
            stage.reductions += 1
        return True

    while any(stage.place < len(stage.schedule) for stage in stages):
        moved = False
        for s, stage in enumerate(stages):
            while stage.place < len(stage.schedule):
                instruction = stage.schedule[stage.place]
                if not execute(s, instruction.kind, instruction.microbatch):
                    break
                stage.place += 1
                moved = True
        require(moved, "deadlock: every stage that is not done waits")
    in_order = list(range(num_microbatches))
    for s, stage in enumerate(stages):
        require(stage.forwards == in_order, f"stage {s}: forwards in the order {stage.forwards}")
        require(stage.backwards == (in_order if with_backward else []), f"stage {s}: backwards {stage.backwards}")
        require(stage.reductions == int(with_backward), f"stage {s} reduces {stage.reductions} times")
        left = (
            stage.activations_in
            | stage.outputs
            | stage.unsent_outputs
            | stage.gradients_in
            | stage.unsent_gradients
            | set(forward_wires[s])
            | set(backward_wires[s])
        )
        require(not left, f"stage {s}: tensors of microbatches {left} were made and never used")
    return [stage.most_in_flight for stage in stages]
