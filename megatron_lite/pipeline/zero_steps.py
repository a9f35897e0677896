"""Puts the steps of ZeRO into a schedule: when parameters are gathered and released, and when gradients are summed.

What a schedule computes, and in which order, does not change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_lite.config.schema import RunConfig
from megatron_lite.pipeline.instructions import USES_PARAMETERS, Instruction, InstructionList, Kind, Schedule

_MAKES_GRADIENTS = frozenset({Kind.BACKWARD, Kind.BACKWARD_WEIGHT})


@dataclass(frozen=True)
class ZeroSteps:
    """gather: none, or of a chunk's parameters: regather, around each forward and each backward of a microbatch; keep,
    around all of a step. reduce: none (there is nobody to sum with), or when gradients begin to be summed over the
    data-parallel ranks: step, after the last microbatch of a chunk; microbatch, after each."""

    gather: Literal["none", "regather", "keep"] = "none"
    reduce: Literal["none", "step", "microbatch"] = "none"

    @staticmethod
    def of(config: RunConfig) -> ZeroSteps:
        """Those of a run. A policy that is left to the run (auto) is the one that needs less memory."""
        parallel = config.parallel
        gather: Literal["regather", "keep"] = "keep" if parallel.gather_policy == "keep" else "regather"
        # Under weight stashing each microbatch is a step of its own, and reduces by itself.
        slices = parallel.zero_stage >= 2 or parallel.reduce_policy == "microbatch"
        sums = not parallel.weight_stashing and (config.dp > 1 or slices)
        return ZeroSteps(
            gather if parallel.zero_stage == 3 else "none",
            parallel.reduce_policy if sums else "none",
        )


def with_zero(schedule: Schedule, steps: ZeroSteps) -> Schedule:
    """The schedule with GATHER_PARAMETERS, RELEASE_PARAMETERS and START_REDUCTION where they belong."""
    if steps == ZeroSteps():
        return schedule
    return replace(schedule, lists=tuple(tuple(_with_steps(one, steps)) for one in schedule.lists))


def _with_steps(instructions: InstructionList, steps: ZeroSteps) -> Iterator[Instruction]:
    first_use, last_use = _ends(instructions, USES_PARAMETERS)
    _, last_gradient = _ends(instructions, _MAKES_GRADIENTS)
    for place, instruction in enumerate(instructions):
        kind, chunk, m = instruction
        uses = kind in USES_PARAMETERS
        window = Instruction(Kind.GATHER_PARAMETERS, chunk, m if steps.gather == "regather" else -1)
        if uses and (steps.gather == "regather" or (steps.gather == "keep" and first_use[chunk] == place)):
            yield window
        yield instruction
        if uses and (steps.gather == "regather" or (steps.gather == "keep" and last_use[chunk] == place)):
            yield window._replace(kind=Kind.RELEASE_PARAMETERS)
        if kind in _MAKES_GRADIENTS and (
            steps.reduce == "microbatch" or (steps.reduce == "step" and last_gradient[chunk] == place)
        ):
            yield Instruction(Kind.START_REDUCTION, chunk, m)


def _ends(instructions: Sequence[Instruction], kinds: frozenset[Kind]) -> tuple[dict[int, int], dict[int, int]]:
    """By chunk, where the first and where the last instruction of these kinds stands."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for place, (kind, chunk, _) in enumerate(instructions):
        if kind in kinds:
            first.setdefault(chunk, place)
            last[chunk] = place
    return first, last
