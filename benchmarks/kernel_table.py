"""What was measured of the kernels, as lines of a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.kernel_timing import OURS, Timing

COLUMNS = ("op", "shape", "dtype", "", "ms", "others, ms", "best / ours", "achieved", "of this machine's")


def rows_of(timing: Timing, copy_bytes_per_s: float, product: Callable[[str], float]) -> list[tuple[str, ...]]:
    """A line for each contender of ours: how it compares to the best of the others, and what it achieves; or that it
    failed."""
    others = [f"{name} {_ms(timing.median_s(name))}" for name in timing.seconds if name not in timing.ours]
    others += [f"{name} failed" for name in timing.failed if not name.startswith(OURS)]
    others += [f"{name} not here" for name in timing.not_here]
    head, rows = (timing.op, timing.label, timing.dtype), []
    for name in timing.ours:
        seconds, ratio = timing.median_s(name), timing.ratio(name)
        if timing.flops:
            rate, of = timing.flops / seconds, product(timing.dtype)
            achieved, share = f"{rate / 1e9:,.0f} GFLOP/s", f"matmul {rate / of:.0%}"
        else:
            rate = timing.bytes_moved / seconds
            achieved, share = f"{rate / 1e9:.1f} GB/s", f"copy {rate / copy_bytes_per_s:.0%}"
        compared = "-" if ratio is None else f"{ratio:.2f}"
        rows.append((*head, name, _ms(seconds), ", ".join(others), compared, achieved, share))
    failed = [name for name in timing.failed if name.startswith(OURS)]
    return rows + [(*head, name, "failed", ", ".join(others), "-", "-", "-") for name in failed]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
