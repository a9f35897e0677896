"""A timeline as a few lines of text, for a console."""

from __future__ import annotations

from bisect import bisect_right
from itertools import groupby

from megatron_lite.pipeline.idle import Cause
from megatron_lite.pipeline.instructions import Kind
from megatron_lite.pipeline.timeline import Timeline
from megatron_lite.report.pipeline_rows import Box, picked, rows_of

MAX_ROWS = 16
NARROWEST = 24  # characters for the time itself
MARKS: dict[Kind | Cause, str] = {
    Kind.FORWARD: "▀",
    Kind.BACKWARD: "▄",
    Kind.BACKWARD_INPUT: "▞",
    Kind.BACKWARD_WEIGHT: "░",
    Kind.GATHER_PARAMETERS: "+",
    Kind.RELEASE_PARAMETERS: "-",
    Kind.START_REDUCTION: "≡",
    Kind.REDUCE_GRADIENTS: "=",
    Cause.RAMP: "·",
    Cause.IMBALANCE: "~",
    Cause.COMMUNICATION: ">",
    Cause.HOST: "'",
}
MIXED = "█"
NAMES: dict[Kind | Cause, str] = {
    Kind.BACKWARD_INPUT: "input half",
    Kind.BACKWARD_WEIGHT: "weight half",
    **{cause: cause.value for cause in Cause},
}


def text_picture(timeline: Timeline, width: int = 80) -> str:
    """One line a rank, then the marks that are used. A box begins with its microbatch, its last digits, if it is wider
    than them; a column shows what its rank does in the middle of it.

    width: of a line, characters; fewer than a picture needs are taken as that many.
    """
    rows, shown = rows_of(timeline), picked(len(timeline.ranks), MAX_ROWS)
    margin = len(f"rank {shown[-1]} ")
    columns = max(NARROWEST, width - margin - 1)
    lines, used = [], set[str]()
    for rank in shown:
        line = _line(rows[rank], float(timeline.makespan), columns, used)
        lines.append(f"{f'rank {rank}':<{margin}}{line}".rstrip())
    if len(shown) < len(rows):
        lines.append(f"({len(shown)} of {len(rows)} ranks)")
    legend = [f"{mark} {NAMES.get(what, what.value)}" for what, mark in MARKS.items() if mark in used]
    legend += [f"{MIXED} work, mixed"] if MIXED in used else []
    return "\n".join([*lines, *_wrapped(legend, margin + columns)])


def _line(boxes: list[Box], makespan: float, columns: int, used: set[str]) -> str:
    starts = [box.start for box in boxes]
    edges = [bisect_right(starts, column * makespan / columns) - 1 for column in range(columns)] + [len(boxes) - 1]
    middles = [bisect_right(starts, (column + 0.5) * makespan / columns) - 1 for column in range(columns)]
    line = ""
    for place, run in groupby(range(columns), key=middles.__getitem__):
        columns_here = list(run)
        mark = MARKS[boxes[place].what]
        if len(columns_here) == 1:
            # Boxes that are shorter than a column: the one in its middle would say nothing of the others.
            inside = boxes[edges[columns_here[0]] : edges[columns_here[0] + 1] + 1]
            kinds = {box.what for box in inside if isinstance(box.what, Kind)}
            mark = MIXED if len(inside) > 3 and len(kinds) > 1 else mark
        used.add(mark)
        text = boxes[place].text[-(len(columns_here) - 1) :] if len(columns_here) > 1 else ""
        line += text + mark * (len(columns_here) - len(text))
    return line


def _wrapped(words: list[str], width: int) -> list[str]:
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + 3 + len(word) > width:
            lines.append("")
        lines[-1] += f"   {word}" if lines[-1] else word
    return lines
