"""What a pipeline rank does in a step, as data: one list of instructions a rank.

The model is cut along its depth into chunks, numbered from the first layers to the last (Megatron-LM's model chunks,
PyTorch's stages). A rank holds one chunk, or several: its virtual stages. `Placement` says who holds what.

Within a chunk, forwards run in microbatch order, and so do backwards and their weight halves, in every schedule: the
gradients of a weight are therefore added in the same order whatever the schedule and the number of stages, and the sum
has the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import NamedTuple


class Kind(Enum):
    """A receive names the chunk that uses the tensor, a send the chunk that made it."""

    FORWARD = "forward"
    BACKWARD = "backward"  # both halves
    BACKWARD_INPUT = "backward for the input"
    BACKWARD_WEIGHT = "backward for the weights"
    SEND_ACTIVATION = "send activation"  # the output of `chunk`, to the holder of the next chunk
    RECEIVE_ACTIVATION = "receive activation"  # the input of `chunk`, from the holder of the one before
    SEND_GRADIENT = "send gradient"  # of the input of `chunk`, to the holder of the chunk before
    RECEIVE_GRADIENT = "receive gradient"  # of the output of `chunk`, from the holder of the next one
    GATHER_PARAMETERS = "gather parameters"  # of `chunk`, which is used next; without a microbatch: for the whole step
    RELEASE_PARAMETERS = "release parameters"  # those that were gathered
    START_REDUCTION = (
        "start reduction"  # of what gradients `chunk` has after `microbatch`, over the data-parallel ranks
    )
    REDUCE_GRADIENTS = "reduce gradients"  # to the end, over the other axes of the mesh, and between the uses of a tie


COMPUTES = frozenset({Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT})
USES_PARAMETERS = frozenset({Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT})
ZERO_STEPS = frozenset({Kind.GATHER_PARAMETERS, Kind.RELEASE_PARAMETERS, Kind.START_REDUCTION})
SENDS = frozenset({Kind.SEND_ACTIVATION, Kind.SEND_GRADIENT})
RECEIVES = frozenset({Kind.RECEIVE_ACTIVATION, Kind.RECEIVE_GRADIENT})


class Instruction(NamedTuple):
    """One thing that a rank does. ``chunk`` and ``microbatch`` are -1 for what concerns the whole step."""

    kind: Kind
    chunk: int = -1
    microbatch: int = -1

    def __str__(self) -> str:
        if self.chunk < 0:
            return self.kind.value
        if self.microbatch < 0:
            return f"{self.kind.value} of chunk {self.chunk}"
        return f"{self.kind.value} of chunk {self.chunk}, microbatch {self.microbatch}"


InstructionList = Sequence[Instruction]


@dataclass(frozen=True)
class Placement:
    """Which pipeline rank holds which chunk: ``rank_of[chunk]``."""

    rank_of: tuple[int, ...]

    @property
    def num_chunks(self) -> int:
        return len(self.rank_of)

    @cached_property
    def num_ranks(self) -> int:
        return max(self.rank_of) + 1

    def chunks_of(self, rank: int) -> tuple[int, ...]:
        """The chunks of a rank, in the order of the model."""
        return tuple(chunk for chunk, holder in enumerate(self.rank_of) if holder == rank)

    def is_local(self, chunk: int) -> bool:
        """Whether the output of ``chunk`` is used on the rank that makes it: no message carries it."""
        return chunk + 1 < self.num_chunks and self.rank_of[chunk] == self.rank_of[chunk + 1]


def loop(num_ranks: int, virtual_stages: int = 1) -> Placement:
    """Chunk c on rank ``c mod num_ranks`` (Narayanan et al. 2021)."""
    return Placement(tuple(range(num_ranks)) * virtual_stages)


def vee(num_ranks: int) -> Placement:
    """Down the ranks and up again: two chunks a rank, on the first one the first and the last (Qi et al. 2024)."""
    return Placement((*range(num_ranks), *reversed(range(num_ranks))))


@dataclass(frozen=True)
class Schedule:
    """One step of a whole pipeline: ``lists[rank]``."""

    name: str
    placement: Placement
    num_microbatches: int
    lists: tuple[InstructionList, ...]


class ScheduleError(ValueError):
    """A schedule that cannot be, or is not right."""
