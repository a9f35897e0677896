"""Is everything that a step needs in the lists of the ranks, once, and in an order that can be computed?

Looks at each rank's list alone. For every chunk and kind there is a row: where in the list the instruction of each
microbatch stands, or ``_ABSENT``. A rule is then a comparison of two rows.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator

from megatron_lite.pipeline.instructions import (
    USES_PARAMETERS,
    ZERO_STEPS,
    Instruction,
    InstructionList,
    Kind,
    Placement,
    Schedule,
    ScheduleError,
)

_ABSENT = -1
_HALVES = (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
_NO_ROWS = ZERO_STEPS | {Kind.BACKWARD, Kind.REDUCE_GRADIENTS}
Row = list[int]


def check_lists(schedule: Schedule, *, trains: bool = True) -> None:
    """Raises ScheduleError where an instruction is missing, repeated, on a rank that cannot run it, or out of order.

    On every rank: each chunk's forwards, and backwards or both their halves, once for each microbatch and in microbatch
    order; each tensor received, or made on the same rank, before its use, and sent after it is made; a half for the
    weights after its half for the input; nothing else. REDUCE_GRADIENTS once, after the last gradient of a weight.
    Where parameters are gathered: each use of a chunk between GATHER_PARAMETERS and RELEASE_PARAMETERS of it, for the
    same microbatch or for the step. START_REDUCTION of a chunk never, once, or once a microbatch: when the gradients
    that it sums are there.
    trains: False for the forwards of an evaluation alone.
    """
    placement = schedule.placement
    if len(schedule.lists) != placement.num_ranks:
        raise ScheduleError(f"{len(schedule.lists)} lists of instructions for {placement.num_ranks} ranks")
    for rank, instructions in enumerate(schedule.lists):
        try:
            _RankList(rank, instructions, placement, schedule.num_microbatches).check(trains)
        except ScheduleError as error:
            raise ScheduleError(f"rank {rank}: {error}") from None


def peak_activations(instructions: InstructionList) -> int:
    """Most chunk inputs that a rank holds for a backward at once: each from its FORWARD to the end of its BACKWARD or
    BACKWARD_WEIGHT. Without backwards nothing is held."""
    held = most = 0
    has_backward = False
    for instruction in instructions:
        kind = instruction.kind
        if kind is Kind.FORWARD:
            held += 1
            most = max(most, held)
        elif kind is Kind.BACKWARD or kind is Kind.BACKWARD_WEIGHT:
            has_backward = True
            held -= 1
    return most if has_backward else 0


class _RankList:
    """One rank's list, and its rows. A whole backward stands in the rows of both halves."""

    def __init__(self, rank: int, instructions: InstructionList, placement: Placement, num_microbatches: int) -> None:
        self._list, self._placement, self._num_microbatches = instructions, placement, num_microbatches
        self._chunks = placement.chunks_of(rank)
        self._rows: dict[Kind, dict[int, Row]] = {
            kind: {chunk: [_ABSENT] * num_microbatches for chunk in self._chunks}
            for kind in Kind
            if kind not in _NO_ROWS
        }
        self._zero_steps: list[int] = []
        self._reduces: list[int] = []
        for position, instruction in enumerate(instructions):
            kind, chunk, microbatch = instruction
            if kind is Kind.REDUCE_GRADIENTS:
                self._reduces.append(position)
                continue
            if chunk not in self._chunks:
                holder = f"on rank {placement.rank_of[chunk]}" if 0 <= chunk < placement.num_chunks else "on no rank"
                raise ScheduleError(f'"{instruction}" cannot run there: chunk {chunk} is {holder}')
            if kind in ZERO_STEPS:
                self._zero_steps.append(position)
                if microbatch == -1 and kind is not Kind.START_REDUCTION:
                    continue
            if not 0 <= microbatch < num_microbatches:
                raise ScheduleError(f'"{instruction}": the step has microbatches 0 to {num_microbatches - 1}')
            if kind in ZERO_STEPS:
                continue
            for half in _HALVES if kind is Kind.BACKWARD else (kind,):
                row = self._rows[half][chunk]
                if row[microbatch] != _ABSENT:
                    raise self._repeated(instruction, instructions[row[microbatch]])
                row[microbatch] = position

    def _repeated(self, instruction: Instruction, first: Instruction) -> ScheduleError:
        if instruction == first:
            return ScheduleError(f'"{instruction}" stands there twice')
        return ScheduleError(f'"{instruction}" does again what "{first}" has done')

    def check(self, trains: bool) -> None:
        for chunk in self._chunks:
            needed = dict(self._needed(chunk, trains))
            for kind, rows in self._rows.items():
                self._check_row(kind, chunk, rows[chunk], kind in needed)
            for kind, users in needed.items():
                for user, user_chunk in users:
                    self._check_before((kind, chunk), (user, user_chunk))
            for kind in (Kind.FORWARD, *(_HALVES if trains else ())):
                row = self._rows[kind][chunk]
                if not all(map(operator.lt, row, row[1:])):
                    m = next(m for m in range(1, len(row)) if row[m] < row[m - 1])
                    late, early = self._list[row[m - 1]], self._list[row[m]]
                    raise ScheduleError(
                        f'"{early}" stands before "{late}": the sums of gradients would have other bits than without a '
                        "pipeline"
                    )
        self._check_reduction(trains)
        self._check_gathering()
        self._check_sums()

    def _needed(self, chunk: int, trains: bool) -> Iterator[tuple[Kind, tuple[tuple[Kind, int], ...]]]:
        """The kinds that a chunk needs for every microbatch, each with what has to stand after it."""
        placement = self._placement
        is_last = chunk + 1 == placement.num_chunks
        receives_input = chunk > 0 and not placement.is_local(chunk - 1)
        sends_output = not is_last and not placement.is_local(chunk)
        after: list[tuple[Kind, int]] = [(Kind.BACKWARD_INPUT, chunk)] if trains else []
        if sends_output:
            after.append((Kind.SEND_ACTIVATION, chunk))
            yield Kind.SEND_ACTIVATION, ()
        elif not is_last:
            after.append((Kind.FORWARD, chunk + 1))
        yield Kind.FORWARD, tuple(after)
        if receives_input:
            yield Kind.RECEIVE_ACTIVATION, ((Kind.FORWARD, chunk),)
        if not trains:
            return
        after = [(Kind.BACKWARD_WEIGHT, chunk)]
        if receives_input:
            after.append((Kind.SEND_GRADIENT, chunk))
            yield Kind.SEND_GRADIENT, ()
        elif chunk > 0:
            after.append((Kind.BACKWARD_INPUT, chunk - 1))
        yield Kind.BACKWARD_INPUT, tuple(after)
        yield Kind.BACKWARD_WEIGHT, ()
        if sends_output:
            yield Kind.RECEIVE_GRADIENT, ((Kind.BACKWARD_INPUT, chunk),)

    def _check_row(self, kind: Kind, chunk: int, row: Row, is_needed: bool) -> None:
        if is_needed and _ABSENT in row:
            missing = Instruction(kind, chunk, row.index(_ABSENT))
            other = {Kind.BACKWARD_INPUT: Kind.BACKWARD_WEIGHT, Kind.BACKWARD_WEIGHT: Kind.BACKWARD_INPUT}.get(kind)
            if other and self._rows[other][chunk][missing.microbatch] == _ABSENT:
                missing = missing._replace(kind=Kind.BACKWARD)
            raise ScheduleError(f'"{missing}" is missing')
        if not is_needed and any(position != _ABSENT for position in row):
            position = next(position for position in row if position != _ABSENT)
            raise ScheduleError(f'"{self._list[position]}" has no place in this schedule')

    def _check_before(self, first: tuple[Kind, int], second: tuple[Kind, int]) -> None:
        """In every microbatch; the two halves of a whole backward stand at one position."""
        rows = [self._rows[kind][chunk] for kind, chunk in (first, second)]
        is_right: Callable[[int, int], bool] = operator.le if second[0] is Kind.BACKWARD_WEIGHT else operator.lt
        if not all(map(is_right, *rows)):
            m = next(m for m in range(len(rows[0])) if not is_right(rows[0][m], rows[1][m]))
            made, used = (self._list[row[m]] for row in rows)
            raise ScheduleError(f'"{used}" stands before "{made}"')

    def _check_reduction(self, trains: bool) -> None:
        reduce = Instruction(Kind.REDUCE_GRADIENTS)
        if not trains and self._reduces:
            raise ScheduleError(f'"{reduce}" has no place in this schedule')
        if not trains:
            return
        if len(self._reduces) != 1:
            raise ScheduleError(f'"{reduce}" ' + ("stands there twice" if self._reduces else "is missing"))
        last = max((max(row, default=_ABSENT) for row in self._rows[Kind.BACKWARD_WEIGHT].values()), default=_ABSENT)
        if self._reduces[0] < last:
            raise ScheduleError(f'"{reduce}" stands before "{self._list[last]}"')

    def _check_gathering(self) -> None:
        """Every use of a chunk lies in a window of its own kind, or no chunk is ever gathered."""
        if not any(self._list[place].kind is not Kind.START_REDUCTION for place in self._zero_steps):
            return
        open_windows: dict[int, Instruction] = {}
        for instruction in self._list:
            kind, chunk, microbatch = instruction
            window = open_windows.get(chunk)
            if kind is Kind.GATHER_PARAMETERS:
                if window is not None:
                    raise ScheduleError(f'"{instruction}" stands before what "{window}" gathered is released')
                open_windows[chunk] = instruction
            elif kind is Kind.RELEASE_PARAMETERS:
                if window is None or window.microbatch != microbatch:
                    raise ScheduleError(f'"{instruction}" stands there, and nothing is gathered for it')
                del open_windows[chunk]
            elif kind in USES_PARAMETERS and (window is None or window.microbatch not in (-1, microbatch)):
                raise ScheduleError(f'"{instruction}" stands where the parameters of chunk {chunk} are not gathered')
        for window in open_windows.values():
            raise ScheduleError(f'what "{window}" gathered is never released')

    def _check_sums(self) -> None:
        """Of each chunk: no START_REDUCTION, one after its last gradient, or one after each microbatch's."""
        found: dict[int, dict[int, int]] = {chunk: {} for chunk in self._chunks}
        for place in self._zero_steps:
            kind, chunk, microbatch = self._list[place]
            if kind is Kind.START_REDUCTION:
                if microbatch in found[chunk]:
                    raise ScheduleError(f'"{self._list[place]}" stands there twice')
                found[chunk][microbatch] = place
        if len({min(len(sums), 2) for sums in found.values()}) > 1:
            raise ScheduleError("the gradients of some chunks are summed in other steps than those of others")
        for chunk, sums in found.items():
            made = self._rows[Kind.BACKWARD_WEIGHT][chunk]
            if len(sums) not in (0, 1, self._num_microbatches):
                missing = next(m for m in range(self._num_microbatches) if m not in sums)
                raise ScheduleError(f'"{Instruction(Kind.START_REDUCTION, chunk, missing)}" is missing')
            for microbatch, place in sums.items():
                last = max(made) if len(sums) == 1 else made[microbatch]
                if place < last:
                    raise ScheduleError(f'"{self._list[place]}" stands before "{self._list[last]}"')
                if self._reduces and place > self._reduces[0]:
                    raise ScheduleError(f'"{self._list[self._reduces[0]]}" stands before "{self._list[place]}"')
