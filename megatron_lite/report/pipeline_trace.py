"""A timeline as a trace that Perfetto (https://ui.perfetto.dev) and chrome://tracing open."""

from __future__ import annotations

from typing import Any

from megatron_lite.pipeline.idle import idle_times
from megatron_lite.pipeline.instructions import RECEIVES, SENDS, Instruction
from megatron_lite.pipeline.timeline import Timeline

MICROSECONDS = 1e6


def chrome_trace(timeline: Timeline) -> dict[str, Any]:
    """The object form of the Trace Event Format: a process ``pipeline`` with a thread for each rank.

    Complete events are instructions (category ``compute`` or ``message``) and the times without work (category
    ``idle``, named for their cause). Times are microseconds, as the format wants them, from the timeline's beginning.
    """
    step = "simulated step" if timeline.step is None else f"step {timeline.step}"
    events = [_about("process_name", 0, name=f"pipeline: {timeline.schedule}, {step}")]
    for rank, (spans, idle) in enumerate(zip(timeline.ranks, idle_times(timeline), strict=True)):
        chunks = ", ".join(map(str, timeline.placement.chunks_of(rank)))
        events.append(_about("thread_name", rank, name=f"rank {rank} (chunk {chunks})"))
        events.append(_about("thread_sort_index", rank, sort_index=rank))
        row = [
            _event(start, end, timeline, rank, name=cause.value, cat="idle", args={"cause": cause.value})
            for start, end, cause in idle
            if _us(end - start) > 0  # less than a nanosecond is what rounding leaves
        ]
        for span in spans:
            kind, chunk, microbatch = span.instruction
            cat = "message" if kind in SENDS | RECEIVES else "compute"
            args = {"chunk": chunk, "microbatch": microbatch, "waited_us": _us(span.waited)}
            name = _name(span.instruction)
            row.append(_event(span.began, span.end, timeline, rank, name=name, cat=cat, args=args))
        # An idle box encloses the messages that the host starts in it: the longer event goes first.
        events += sorted(row, key=lambda event: (event["ts"], -event["dur"]))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _name(instruction: Instruction) -> str:
    kind, _, microbatch = instruction
    return kind.value if microbatch < 0 else f"{kind.value} {microbatch}"


def _us(seconds: float) -> float:
    return round(float(seconds) * MICROSECONDS, 3)


def _event(start: float, end: float, timeline: Timeline, rank: int, **fields: Any) -> dict[str, Any]:
    ts = _us(start - timeline.begin)
    return {"ph": "X", "pid": 0, "tid": rank, "ts": ts, "dur": round(_us(end - timeline.begin) - ts, 3), **fields}


def _about(what: str, rank: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "pid": 0, "tid": rank, "name": what, "args": args}
