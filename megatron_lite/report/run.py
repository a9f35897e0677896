"""A finished or running run, read back from its folder."""

from __future__ import annotations

import json
import lzma
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_lite.config import RunConfig, load_config
from megatron_lite.data.prepare import CorpusSummary, read_summary
from megatron_lite.report.series import is_drawable
from megatron_lite.utils import run_files
from megatron_lite.utils.files import DataError

# Above this size the validation text is not compressed for comparison: it takes a second for each two megabytes.
MAX_COMPRESSED_BYTES = 1 << 24


class ReportError(ValueError):
    """A folder that no report can be made of; the message names it and says what to do."""


@dataclass(frozen=True)
class Run:
    """records: the objects of metrics.jsonl in order of their steps, at least one. resumes: the first steps of the
    processes that went on with the run, as far as the records show it."""

    folder: Path
    config: RunConfig
    records: tuple[Mapping[str, float], ...]
    resumes: tuple[int, ...] = ()

    def series(self, key: str) -> list[tuple[float, float]]:
        """(step, value) where the value is there."""
        return [(record["step"], record[key]) for record in self.records if key in record]

    @property
    def is_finished(self) -> bool:
        return self.records[-1]["step"] >= self.config.train.num_steps


def read_run(folder: Path) -> Run:
    """Raises ReportError for a folder without metrics, or with broken ones; ConfigError for a broken config."""
    path = folder / run_files.METRICS
    if not path.is_file():
        raise ReportError(f"{folder}: has no {run_files.METRICS}; name the folder of a run, such as runs/quickstart")
    records: list[Mapping[str, float]] = []
    resumes: list[int] = []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = _record(line)
        except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError):
            if number == len(lines):
                break  # the line that a full disk or a kill cut short
            raise ReportError(f"{path}:{number}: is no record of a step; remove the line, or train again") from None
        if records and _begins_anew(records[-1], record):
            resumes = [step for step in resumes if step < record["step"]] + [int(record["step"])]
            while records and records[-1]["step"] >= record["step"]:
                records.pop()
        records.append(record)
    if not records:
        raise ReportError(f"{path}: has no step yet; wait for the first one, or train again")
    return Run(folder, load_config(folder / run_files.CONFIG), tuple(records), tuple(resumes))


def _begins_anew(before: Mapping[str, float], record: Mapping[str, float]) -> bool:
    """Whether other processes wrote a record than the one before: they went back, or have used less memory so far."""
    less_memory = record.get("peak_memory_bytes", math.inf) < before.get("peak_memory_bytes", 0)
    return record["step"] <= before["step"] or less_memory


def _record(line: bytes) -> dict[str, float]:
    """The numbers of one line, integers as they are; raises what a line without a step and a loss gives.

    A loss that is no number is not in the line, whose other numbers show that it is whole: it is read as NaN.
    """
    values = {key: value for key, value in json.loads(line).items() if isinstance(value, int | float)}
    if not isinstance(values["step"], int) or not is_drawable(values["step"]):
        raise TypeError("a step is a whole number")
    if "tokens" in values:
        values.setdefault("loss", math.nan)
    values["loss"]
    return values


def evaluated_share(run: Run) -> float | None:
    """The part of the validation tokens that an evaluation predicts; None if their number is not known."""
    summary, train = _corpus_of_validation(run), run.config.train
    if summary is None or summary.valid is None or not summary.valid.tokens:
        return None
    samples = min(train.eval_batches * train.global_batch_size, (summary.valid.tokens - 1) // train.seq_len)
    return samples * train.seq_len / summary.valid.tokens


def compressed_bits_per_byte(run: Run) -> float | None:
    """Bits that ``xz -9`` needs for a byte of the run's validation text; None if it is not there, or too large."""
    summary = _corpus_of_validation(run)
    if summary is None or summary.valid_text is None:
        return None
    text = Path(summary.valid_text)
    try:
        content = text.read_bytes() if text.stat().st_size <= MAX_COMPRESSED_BYTES else b""
    except OSError:
        return None
    return 8 * len(lzma.compress(content, preset=9)) / len(content) if content else None


def _corpus_of_validation(run: Run) -> CorpusSummary | None:
    """None unless the run was evaluated on the validation files of one corpus, whose summary is there."""
    if len(run.config.data.valid) != 1:
        return None
    prefix = Path(run.config.data.valid[0])
    try:
        summary = read_summary(prefix.parent)
    except DataError:
        return None
    return summary if summary.valid is not None and Path(summary.valid.prefix).name == prefix.name else None
