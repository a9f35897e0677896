"""From measurements to numbers, checks and tables."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from benchmarks.rows import OURS, Row
from benchmarks.team import Measurement
from benchmarks.workloads import Workload

MIB = 2**20
# Relative differences between contenders that are still one computation. fp32: the order of sums; and torch adds the
# squares of a tensor in fp32, which by itself is off by 1e-4 to 1e-3 over millions of elements (W1: 7e-5 at the first
# step, against the same gradients in float64). bf16: every contender rounds at other places (2**-8 a rounding), which
# averages out in the mean loss but less so in the norm.
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-3}
NORM_TOLERANCE = {"fp32": 5e-3, "bf16": 3e-2}
INITIAL_LOSS_TOLERANCE = 0.05  # of ln(vocabulary), for weights of standard deviation 0.02
# The number of target tokens, and the loss and the squared norm as exact sums (utils/exact.py), are summed over ranks.
SCALAR_ELEMENTS = 1000
# Of the CPU seconds of a step (and 20 ms, for the pipe and the collector): more would slow whoever is being measured.
IDLE_CPU_TOLERANCE = 0.02


@dataclass(frozen=True)
class Record:
    """All that was measured of one contender in one row; `warmup` and `rounds` in the order they ran."""

    row: str
    contender: str
    num_parameters: int
    build_peak_rss_bytes: list[int]
    warmup: list[Measurement]
    rounds: list[Measurement]

    @property
    def walls(self) -> list[float]:
        return [m.wall_s for m in self.rounds]

    @property
    def median_s(self) -> float:
        return median(self.walls)

    @property
    def best_s(self) -> float:
        return min(self.walls)

    @property
    def cpu_s(self) -> float:
        return median(m.cpu_s for m in self.rounds)

    @property
    def idle_cpu_s(self) -> float:
        return median(m.idle_cpu_s for m in self.rounds)

    @property
    def peak_rss_mib(self) -> float:
        """Of the largest rank, over its whole life."""
        return max(self.rounds[-1].peak_rss_bytes) / MIB

    @property
    def volume(self) -> float:
        """Elements that the collectives of a rank carried in a step, in parameters of the model."""
        return median(m.traffic.elements for m in self.rounds) / self.num_parameters

    @property
    def moved_mib(self) -> float:
        return median(m.traffic.bytes for m in self.rounds) / MIB

    def summary(self, workload: Workload) -> dict[str, Any]:
        return {
            "best_s": self.best_s,
            "median_s": self.median_s,
            "cpu_s": self.cpu_s,
            "peak_rss_mib": self.peak_rss_mib,
            "moved_mib": self.moved_mib,
            "volume_parameters": self.volume,
            "tokens_per_s": workload.tokens_per_step / self.median_s,
            "model_gflops": workload.flops_per_token * workload.tokens_per_step / self.median_s / 1e9,
        }

    def to_json(self, workload: Workload) -> dict[str, Any]:
        return {**asdict(self), "summary": self.summary(workload)}


def time_ratios(ours: Record, other: Record) -> tuple[float, float]:
    """(ratio of medians, median of the ratios of each round), ours / other: below 1 means that ours is faster."""
    paired = [mine / theirs for mine, theirs in zip(ours.walls, other.walls, strict=True)]
    return ours.median_s / other.median_s, median(paired)


def disagreements(row: Row, workload: Workload, records: list[Record]) -> list[str]:
    """Why these contenders cannot have computed the same thing; empty if all agree.

    They share weights, tokens and optimizer, so parameters, losses and gradient norms must agree at every step.
    """
    found: list[str] = []
    reference = records[-1]  # a peer, so that ours is never its own judge
    for record in records:
        who = f"{row.name}, {record.contender}"
        if record.num_parameters != workload.num_parameters:
            found.append(f"{who}: {record.num_parameters} parameters, expected {workload.num_parameters}")
        steps = record.warmup + record.rounds
        expected = math.log(workload.vocab_size)
        if not abs(steps[0].loss - expected) <= INITIAL_LOSS_TOLERANCE * expected:
            found.append(f"{who}: initial loss {steps[0].loss:.4f}, expected about ln(vocabulary) = {expected:.4f}")
        for number, (mine, theirs) in enumerate(zip(steps, reference.warmup + reference.rounds, strict=True)):
            pairs = (
                ("loss", mine.loss, theirs.loss, LOSS_TOLERANCE[row.dtype]),
                ("gradient norm", mine.grad_norm, theirs.grad_norm, NORM_TOLERANCE[row.dtype]),
            )
            for name, value, other, tolerance in pairs:
                if not abs(value - other) <= tolerance * abs(other):
                    found.append(
                        f"{who}: {name} {value:.6f} at step {number}, but {reference.contender} has {other:.6f} "
                        f"(tolerance {tolerance:g})"
                    )
    return found


def zero_volume(row: Row, workload: Workload) -> int:
    """Elements that the collectives of ours carry in a step, by the analysis of ZeRO (Rajbhandari et al. 2020, 7).

    Every unit is gathered after the update, or at stage 3 before use: once a step, or in each forward and each backward
    (not between two uses that follow each other: those of the head, and, from one microbatch to the next, of the
    embedding). Its gradient is reduced once a step, or from stage 2 on in each microbatch. Units (the embedding, a
    layer, final norm and head) are padded to 256 elements a rank.
    """
    sizes: dict[str, int] = {}
    for name, shape in workload.parameter_shapes().items():
        unit = name.split(".")[2] if ".layers." in name else "embedding" if "embed_tokens" in name else "head"
        sizes[unit] = sizes.get(unit, 0) + math.prod(shape)
    padded = {unit: -(-size // (256 * row.dp)) * 256 * row.dp for unit, size in sizes.items()}
    whole, each = sum(padded.values()), row.num_microbatches
    gathered = whole
    if row.zero_stage == 3 and not row.keeps_parameters:
        gathered = each * (2 * whole - padded["head"]) - (each - 1) * padded["embedding"]
    return gathered + whole * (each if row.zero_stage >= 2 else 1)


def off_theory(row: Row, workload: Workload, records: list[Record]) -> list[str]:
    """Where ours moves another volume than theory says; empty for rows of no ZeRO comparison."""
    if not row.name.startswith("zero-"):
        return []
    expected = zero_volume(row, workload)
    return [
        f"{row.name}, {record.contender}: moved {step.traffic.elements} elements in a step, theory says {expected} "
        f"and at most {SCALAR_ELEMENTS} for the loss and the norm"
        for record in records
        if record.contender == OURS
        for step in record.rounds
        if not expected <= step.traffic.elements <= expected + SCALAR_ELEMENTS
    ]


def spinning(record: Record) -> str | None:
    """A warning if a contender burned CPU while others were measured, else None."""
    if record.idle_cpu_s <= IDLE_CPU_TOLERANCE * record.cpu_s + 0.02:
        return None
    return f"{record.row}, {record.contender}: burned {record.idle_cpu_s:.3f} CPU-s between its steps"


COLUMNS = (
    "row",
    "contender",
    "best s",
    "median s",
    "tokens/s",
    "CPU-s",
    "peak RSS MiB",
    "moved MiB",
    "moved P",
    "ours / it",
    "paired",
)


def table(records: list[Record], workload: Workload) -> list[tuple[str, ...]]:
    """The rows under COLUMNS; moved P is in parameters of the model.

    The last two compare the time of ours with that of the contender on the line.
    """
    lines: list[tuple[str, ...]] = []
    for record in records:
        ours = next((r for r in records if r.row == record.row and r.contender == OURS), None)
        ratios: tuple[str, str] = ("", "")
        if ours is not None and record is not ours:
            of_medians, paired = time_ratios(ours, record)
            ratios = (f"{of_medians:.3f}", f"{paired:.3f}")
        tokens_per_s = f"{workload.tokens_per_step / record.median_s:.0f}"
        times = (f"{record.best_s:.3f}", f"{record.median_s:.3f}", tokens_per_s, f"{record.cpu_s:.2f}")
        moved = (f"{record.moved_mib:.1f}", f"{record.volume:.2f}")
        name = record.contender.removeprefix("peers.")
        lines.append((record.row, name, *times, f"{record.peak_rss_mib:.0f}", *moved, *ratios))
    return lines


def markdown(lines: list[tuple[str, ...]]) -> str:
    rule = "|" + "|".join("---" if i < 2 else "---:" for i in range(len(COLUMNS))) + "|"
    return "\n".join(["| " + " | ".join(COLUMNS) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)])
