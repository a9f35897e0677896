"""One record a step, and everything that is fed from it: metrics.jsonl, TensorBoard, wandb."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_lite.config.schema import RunConfig
from megatron_lite.utils import run_files
from megatron_lite.utils.files import NO_SPACE


class MetricsError(ValueError):
    """Metrics that cannot be written; the message names the file or the package, and the remedy."""


@dataclass(frozen=True)
class StepRecord:
    """What a step leaves behind.

    step: from 1. tokens: target tokens so far, this step included. loss: mean over the global batch, nats. grad_norm:
    before clipping. loss_scale: the factor on the loss in this step, 1 without fp16. step_time_s: of the step alone,
    without evaluation. tokens_per_s: over all ranks. mfu: model FLOPs utilisation, 0 .. 1. peak_memory_bytes: of the
    rank that has used most so far. skipped_steps: with fp16, the steps of the run so far that changed nothing, as a
    gradient overflowed; of such a step itself the loss or the norm is no number. valid_loss (nats) and
    valid_bits_per_byte: only where an evaluation followed the step.
    """

    step: int
    tokens: int
    loss: float
    grad_norm: float
    lr: float
    loss_scale: float
    step_time_s: float
    tokens_per_s: float
    mfu: float
    peak_memory_bytes: int
    skipped_steps: int | None = None
    valid_loss: float | None = None
    valid_bits_per_byte: float | None = None

    @property
    def was_skipped(self) -> bool:
        """Whether the step changed no weight, as something overflowed in fp16."""
        overflowed = not (math.isfinite(self.loss) and math.isfinite(self.grad_norm))
        return overflowed and self.skipped_steps is not None

    def as_dict(self) -> dict[str, float]:
        """The values that are there, by name: neither what is None nor what is no number, which JSON has not."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


class Sink(Protocol):
    """Something that takes records. ``close`` is told whether the run came to its end."""

    def write(self, record: StepRecord) -> None: ...
    def close(self, succeeded: bool) -> None: ...


class MetricsFile:
    """metrics.jsonl: one JSON object a step, each flushed, so that a run that is killed leaves whole lines.

    What is in the file stays: the records of the steps before, where a run goes on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _explained(path, "before the first step"):
            self._file = path.open("a", encoding="utf-8")

    def write(self, record: StepRecord) -> None:
        with _explained(self.path, f"at step {record.step}"):
            self._file.write(json.dumps(record.as_dict()) + "\n")
            self._file.flush()

    def close(self, succeeded: bool) -> None:
        # Closing tries again to write what write could not, and has reported.
        with _explained(self.path, "at the end") if succeeded else contextlib.suppress(OSError):
            self._file.close()


class TensorBoard:
    """Event files in the run's folder, under the names of the record.

    A run that goes on writes another file, which tells readers to forget what the files before hold of its steps.
    """

    def __init__(self, folder: Path, steps_before: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=steps_before + 1 if steps_before else None)

    def write(self, record: StepRecord) -> None:
        for name, value in record.as_dict().items():
            if name != "step":
                self._writer.add_scalar(name, value, record.step)

    def close(self, succeeded: bool) -> None:
        self._writer.close()


class Wandb:
    """One Weights & Biases run for all ranks. offline: on disk in the run's folder, for ``wandb sync --append``.

    A run that goes on keeps its id, which is in the name of the folder that wandb made for it. Steps that were logged
    before and are taken again have the same values; wandb drops them.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        import wandb

        mode: Any = config.run.wandb
        before = sorted((folder / run_files.WANDB).glob("*run-*-*"), key=lambda path: path.name.partition("run-")[2])
        settings = wandb.Settings(silent=True, console="off")
        self._run: Any = wandb.init(
            project="megatron-lite",
            name=config.run.name,
            dir=str(folder),
            id=before[-1].name.rpartition("-")[2] if before else None,
            resume="allow",
            mode=mode,
            config=config.model_dump(),
            settings=settings,
        )

    def write(self, record: StepRecord) -> None:
        values = record.as_dict()
        self._run.log({name: value for name, value in values.items() if name != "step"}, step=record.step)

    def close(self, succeeded: bool) -> None:
        self._run.finish(exit_code=0 if succeeded else 1)


def check_extras(config: RunConfig) -> None:
    """Raises MetricsError if the config asks for a package that is not installed."""
    asked = {"tensorboard": config.run.tensorboard, "wandb": config.run.wandb != "off"}
    for package, is_asked in asked.items():
        if is_asked and importlib.util.find_spec(package) is None:
            value, off = str(getattr(config.run, package)).lower(), "off" if package == "wandb" else "false"
            raise MetricsError(
                f"run.{package} = {value} needs the package {package}, which is not installed; "
                f"pip install 'megatron-lite[{package}]', or set run.{package}={off}"
            )


@contextlib.contextmanager
def open_sinks(config: RunConfig, folder: Path, console: Sink, steps_before: int = 0) -> Iterator[list[Sink]]:
    """What the config wants records written to, closed at the end whatever happens. For one rank of a run.

    steps_before: steps that the run took before this process went on with it.
    """
    sinks = [console]
    succeeded = False
    try:
        sinks.append(MetricsFile(folder / run_files.METRICS))
        if config.run.tensorboard:
            sinks.append(TensorBoard(folder / run_files.TENSORBOARD, steps_before))
        if config.run.wandb != "off":
            sinks.append(Wandb(config, folder))
        yield sinks
        succeeded = True
    finally:
        for sink in sinks:
            sink.close(succeeded)


@contextlib.contextmanager
def _explained(path: Path, when: str) -> Iterator[None]:
    """Turns an OSError into a MetricsError that says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in NO_SPACE
        what = "no space left to write it" if full else "cannot be written"
        remedy = "free some space, raise the quota or the file-size limit" if full else "check the folder"
        raise MetricsError(
            f"{path}: {what} {when} ({error.strerror}); {remedy}, or choose another disk with run.dir"
        ) from error
