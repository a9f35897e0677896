"""A user's own schedule, from a CSV file in PyTorch's compute-only format (`torch.distributed.pipelining`).

One row a pipeline rank, one cell an instruction: the chunk, ``F`` forward, ``B`` whole backward, ``I`` its input half
or ``W`` its weight half, and the microbatch: ``0F3``, ``1B2``. Empty cells, with which rows are aligned, are skipped.
Two instructions that PyTorch overlaps, ``(0F3;7B1)OVERLAP_F_B``, stand one after the other here. Sends and receives are
not in the file: they follow from the order.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_lite.pipeline.instructions import COMPUTES, Instruction, Kind, Placement, Schedule, ScheduleError

_LETTERS = {Kind.FORWARD: "F", Kind.BACKWARD: "B", Kind.BACKWARD_INPUT: "I", Kind.BACKWARD_WEIGHT: "W"}
_KINDS = {letter: kind for kind, letter in _LETTERS.items()}
_ONE = re.compile(r"([0-9]+)([FBIW])([0-9]+)")
_OVERLAPPED = re.compile(r"\(([^()]*)\)OVERLAP_F_B")
_PARTS = {
    Kind.FORWARD: ("forward",),
    Kind.BACKWARD: ("input half", "weight half"),
    Kind.BACKWARD_INPUT: ("input half",),
    Kind.BACKWARD_WEIGHT: ("weight half",),
}
# What a part of a chunk's work on a microbatch uses of the same chunk.
_BEFORE = {"input half": "forward", "weight half": "input half"}


class _Cell(NamedTuple):
    path: Path
    row: int
    column: int
    instruction: Instruction

    @property
    def text(self) -> str:
        kind, chunk, m = self.instruction
        return f"{chunk}{_LETTERS[kind]}{m}"

    def error(self, problem: str) -> ScheduleError:
        return ScheduleError(f"{self.path}, line {self.row}, cell {self.column}: {self.text} {problem}")


def write_schedule(schedule: Schedule, path: Path) -> None:
    """Writes the order in which the ranks of a schedule compute, without sends and receives."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for instructions in schedule.lists:
            computes = (instruction for instruction in instructions if instruction.kind in COMPUTES)
            writer.writerow(f"{chunk}{_LETTERS[kind]}{m}" for kind, chunk, m in computes)


def read_orders(
    path: Path, num_ranks: int, virtual_stages: int, num_microbatches: int
) -> tuple[Placement, list[list[Instruction]]]:
    """Who holds which chunk, and the order in which each rank computes.

    Raises ScheduleError, with line, cell and remedy, for a file that cannot be read, or that is not a schedule of
    ``num_microbatches`` on ``num_ranks`` ranks with ``virtual_stages`` chunks each: all instructions once, and in each
    chunk in microbatch order. That the ranks do not wait for each other is not looked at here.
    """
    rows = [list(_cells(path, number, row)) for number, row in enumerate(_rows(path), 1)]
    if len(rows) != num_ranks:
        raise ScheduleError(
            f"{path}: {len(rows)} lines, one a rank, for {num_ranks} pipeline ranks: set parallel.pp={len(rows)}, or "
            "write a line for each rank"
        )
    placement = _placement(path, rows, virtual_stages)
    last = max((cell for row in rows for cell in row), key=lambda cell: cell.instruction.microbatch)
    in_file = last.instruction.microbatch + 1
    if in_file > num_microbatches:
        raise last.error(
            f"is of a microbatch past the last, {num_microbatches - 1}: take it out, or set the batch so that a step "
            f"has {in_file} microbatches"
        )
    if in_file < num_microbatches:
        raise ScheduleError(
            f"{path}: ends with microbatch {in_file - 1}, and a step has {num_microbatches}: set the batch so that a "
            f"step has {in_file}, or go on to microbatch {num_microbatches - 1}"
        )
    for row in rows:
        _check_row(row, num_microbatches)
    return placement, [[cell.instruction for cell in row] for row in rows]


def _rows(path: Path) -> list[list[str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ScheduleError(f"{path} cannot be read as a schedule: {error}") from error
    while rows and not any(cell.strip() for cell in rows[-1]):
        rows.pop()
    if not rows:
        raise ScheduleError(f"{path} is empty: write one line a pipeline rank, of cells like 0F0 and 0B0")
    return rows


def _cells(path: Path, row: int, texts: Sequence[str]) -> Iterator[_Cell]:
    for column, text in enumerate(texts, 1):
        overlapped = _OVERLAPPED.fullmatch(text.strip())
        for one in overlapped[1].split(";") if overlapped else [text]:
            if not one.strip():
                continue
            match = _ONE.fullmatch(one.strip())
            if match is None:
                raise ScheduleError(
                    f"{path}, line {row}, cell {column}: {one.strip()!r} is no instruction: write chunk, F (forward), "
                    "B (backward), I or W (its half for the input or the weights) and microbatch, like 0F3; "
                    "leave sends and receives out"
                )
            yield _Cell(path, row, column, Instruction(_KINDS[match[2]], int(match[1]), int(match[3])))


def _placement(path: Path, rows: Sequence[Sequence[_Cell]], virtual_stages: int) -> Placement:
    """The rank of each chunk is the one in whose line it stands."""
    num_chunks = len(rows) * virtual_stages
    first: dict[int, tuple[int, _Cell]] = {}
    for rank, row in enumerate(rows):
        for cell in row:
            chunk = cell.instruction.chunk
            holder, other = first.setdefault(chunk, (rank, cell))
            if holder != rank:
                raise cell.error(
                    f"is of a chunk that rank {holder} holds (line {other.row}, cell {other.column}: {other.text}): "
                    "leave each chunk on one line"
                )
            if chunk >= num_chunks:
                raise cell.error(
                    f"is of chunk {chunk}, and {len(rows)} ranks with {virtual_stages} virtual stages hold chunks 0 to "
                    f"{num_chunks - 1}: set parallel.virtual_stages={chunk // len(rows) + 1}, or number chunks from 0"
                )
    for rank, row in enumerate(rows):
        held = sorted({cell.instruction.chunk for cell in row})
        if len(held) != virtual_stages:
            raise ScheduleError(
                f"{path}, line {rank + 1}: chunks {', '.join(map(str, held)) or 'none'}, where each rank has "
                f"{virtual_stages}: give each rank as many chunks, and set parallel.virtual_stages to their number"
            )
    return Placement(tuple(first[chunk][0] for chunk in range(num_chunks)))


def _check_row(row: Sequence[_Cell], num_microbatches: int) -> None:
    """Each chunk's forwards, and both halves of its backwards, are there once and in microbatch order."""
    done: dict[tuple[int, str], list[_Cell]] = {
        (chunk, part): [] for chunk in {cell.instruction.chunk for cell in row} for part in ("forward", *_BEFORE)
    }
    for cell in row:
        kind, chunk, m = cell.instruction
        for part in _PARTS[kind]:
            cells = done[chunk, part]
            if m < len(cells):
                raise cell.error(f"repeats the {part} of cell {cells[m].column}, {cells[m].text}: take one of them out")
            if m > len(cells):
                raise cell.error(_out_of_order(row, cell, part, len(cells)))
            before = _BEFORE.get(part)
            # A whole backward brings its own input half.
            if before and m >= len(done[chunk, before]):
                raise cell.error(f"stands before the {before} that it needs: move it behind that")
            cells.append(cell)
    for (chunk, part), cells in done.items():
        if len(cells) < num_microbatches:
            where = f"{row[0].path}, line {row[0].row}"
            raise ScheduleError(f"{where}: the {part} of chunk {chunk}, microbatch {len(cells)}, is missing: add it")


def _out_of_order(row: Sequence[_Cell], cell: _Cell, part: str, expected: int) -> str:
    chunk = cell.instruction.chunk
    for other in row:
        if other.instruction[1:] == (chunk, expected) and part in _PARTS[other.instruction.kind]:
            return (
                f"stands before {other.text} of cell {other.column}: a chunk takes its microbatches in order, so that "
                "gradients are added in one order in all schedules; exchange them"
            )
    return f"stands where the {part} of microbatch {expected} has to, which is missing from the line: add it"
