"""Proves a schedule before a step runs: everything is there once, and no rank waits for ever.

Three layers: the lists of each rank alone (`prove_lists`), the programs of a world of processes that a schedule makes
(here), and whether programs end (`prove_programs`, which knows nothing of schedules).
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_lite.config.schema import RunConfig
from megatron_lite.pipeline.instructions import COMPUTES, InstructionList, Kind, Schedule, ScheduleError
from megatron_lite.pipeline.prove_lists import check_lists, peak_activations
from megatron_lite.pipeline.prove_programs import (
    Collective,
    Compute,
    Operation,
    Receive,
    Semantics,
    Send,
    prove_programs,
)
from megatron_lite.pipeline.schedules import schedule_of

# The collectives that an instruction holds, in their order. An instruction of ZeRO is a line here.
_AXES: dict[Kind, tuple[str, ...]] = dict.fromkeys(COMPUTES, ("tp",)) | {
    Kind.GATHER_PARAMETERS: ("dp",),
    Kind.START_REDUCTION: ("tp", "dp"),
    Kind.REDUCE_GRADIENTS: ("dp", "pp"),
}
_MOST_REPLICAS = 2


@dataclass(frozen=True)
class Proof:
    """What was shown. peak_activations: of each pipeline rank, the most chunk inputs held for a backward at once."""

    schedule: str
    num_microbatches: int
    num_instructions: int
    peak_activations: tuple[int, ...]
    semantics: tuple[Semantics, ...]
    replicas: tuple[int, int]  # (dp, tp) of the world whose collectives were proven
    tied: bool  # whether the exchange of a shared embedding was among them


def prove(schedule: Schedule, *, dp: int = 1, tp: int = 1, tied: bool = False, trains: bool = True) -> Proof:
    """Shows that a schedule computes each thing once and in order, and ends, in a world of pp x dp x tp ranks.

    tied: whether the holders of the first and the last chunk exchange the gradient of a shared embedding.
    trains: False for an evaluation, whose schedule has forwards only.
    Raises ScheduleError with the ranks, the instructions and, where ranks wait for each other, the whole cycle.

    The pipeline alone is proven under every semantics of messages. With its collectives it is proven under rendezvous,
    which is the strictest (`Semantics`), and for at most two replicas along dp and along tp. More cannot differ: every
    replica runs the same lists, messages stay inside a replica, and a collective over dp or tp joins the same place of
    all replicas. Where one replica comes to its end, all do in lockstep, and where one stops, all stop at the same
    instruction. Two are the fewest in which a collective has somebody to wait for. Replicas with lists of their own
    are for `prove_world`.
    """
    prove_world([[schedule]], tuple(Semantics), trains=trains)
    replicas = min(dp, _MOST_REPLICAS), min(tp, _MOST_REPLICAS)
    tied = tied and len({schedule.placement.rank_of[0], schedule.placement.rank_of[-1]}) > 1
    if tied or replicas != (1, 1):
        prove_world([[schedule] * replicas[1]] * replicas[0], (Semantics.RENDEZVOUS,), tied=tied, trains=trains)
    return Proof(
        schedule.name,
        schedule.num_microbatches,
        sum(map(len, schedule.lists)),
        tuple(map(peak_activations, schedule.lists)),
        tuple(Semantics),
        replicas,
        tied,
    )


def prove_run(config: RunConfig) -> Proof:
    """Proves the schedule of a run, whose ``parallel.dp`` is known, in its layout. Raises ScheduleError."""
    tied = config.model.tie_embeddings
    return prove(schedule_of(config), dp=config.dp, tp=config.parallel.tp, tied=tied)


def prove_world(
    replicas: Sequence[Sequence[Schedule]],
    semantics: Sequence[Semantics],
    *,
    tied: bool = False,
    trains: bool = True,
) -> None:
    """Shows that the replicas of a pipeline end together, whatever lists each has: ``replicas[dp][tp]``.

    Raises ScheduleError as `prove` does, and where replicas come to collectives of one group in different orders.
    """
    schedules = {id(schedule): schedule for row in replicas for schedule in row}.values()
    for schedule in schedules:
        check_lists(schedule, trains=trains)
    if len({schedule.placement for schedule in schedules}) > 1:
        raise ScheduleError("replicas of one pipeline must place its chunks alike")
    dp, tp, pp = len(replicas), len(replicas[0]), replicas[0][0].placement.num_ranks
    places = [(p, d, t) for p in range(pp) for d in range(dp) for t in range(tp)]
    names = [f"rank {p}" if dp == tp == 1 else f"rank {p} (dp {d}, tp {t})" for p, d, t in places]
    with _no_garbage_collection():
        prove_programs(world_programs(replicas, tied=tied), semantics, names=names)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Programs are millions of tuples, none in a cycle: to look for cycles takes longer than the proof."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def world_programs(replicas: Sequence[Sequence[Schedule]], *, tied: bool = False) -> list[list[Operation]]:
    """The programs of all ranks, numbered as the mesh does: pp the slowest axis, then dp, then tp.

    An instruction that computes meets its like over tp; the reduction of gradients over dp and then, if ``tied``,
    between the first and the last chunk.
    """
    dp, tp = len(replicas), len(replicas[0])
    pp = replicas[0][0].placement.num_ranks
    programs = []
    for p in range(pp):
        for d in range(dp):
            for t in range(tp):
                schedule = replicas[d][t]
                ranks = [(rank * dp + d) * tp + t for rank in range(pp)]
                ends = sorted({schedule.placement.rank_of[0], schedule.placement.rank_of[-1]})
                groups = {
                    "tp": tuple((p * dp + d) * tp + other for other in range(tp)),
                    "dp": tuple((p * dp + other) * tp + t for other in range(dp)),
                    "pp": tuple(ranks[end] for end in ends) if tied and p in ends else (),
                }
                axes = {
                    kind: tuple((axis, groups[axis]) for axis in _AXES.get(kind, ()) if len(groups[axis]) > 1)
                    for kind in Kind
                }
                programs.append(_program(schedule.lists[p], schedule, ranks, axes))
    return programs


def _program(
    instructions: InstructionList,
    schedule: Schedule,
    ranks: Sequence[int],
    axes: dict[Kind, tuple[tuple[str, tuple[int, ...]], ...]],
) -> list[Operation]:
    """One rank's operations. ``ranks``: those of its pipeline. ``axes``: the collectives of each kind."""
    placement, num_microbatches = schedule.placement, schedule.num_microbatches
    holders = [ranks[rank] for rank in placement.rank_of]
    gradients = placement.num_chunks * num_microbatches  # the tensors with numbers from here on
    comes_in = [chunk > 0 and not placement.is_local(chunk - 1) for chunk in range(placement.num_chunks)]
    comes_back = [*comes_in[1:], False]
    program: list[Operation] = []
    for instruction in instructions:
        kind, chunk, microbatch = instruction
        tensor = chunk * num_microbatches + microbatch  # of the activation that the chunk makes, or of its gradient
        if kind is Kind.SEND_ACTIVATION:
            program.append(Send(instruction, holders[chunk + 1], tensor, "activation"))
        elif kind is Kind.RECEIVE_ACTIVATION:
            program.append(Receive(instruction, holders[chunk - 1], tensor - num_microbatches, "activation"))
        elif kind is Kind.SEND_GRADIENT:
            program.append(Send(instruction, holders[chunk - 1], gradients + tensor - num_microbatches, "gradient"))
        elif kind is Kind.RECEIVE_GRADIENT:
            program.append(Receive(instruction, holders[chunk + 1], gradients + tensor, "gradient"))
        elif kind is Kind.FORWARD and comes_in[chunk]:
            program.append(Compute(instruction, (tensor - num_microbatches,)))
        elif (kind is Kind.BACKWARD or kind is Kind.BACKWARD_INPUT) and comes_back[chunk]:
            program.append(Compute(instruction, (gradients + tensor,)))
        for axis, group in axes[kind]:
            program.append(Collective(instruction, group, axis))
    return program
