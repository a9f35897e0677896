"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_lite.config.batch_rampup import batch_size_at, samples_after
from megatron_lite.config.schema import TrainConfig
from megatron_lite.train.metrics import StepRecord


class ConsoleSink:
    """Shows records on ``console``; on no terminal, one line every ``log_interval`` steps and after an evaluation.

    steps_before, samples_before: that the run took before this process went on with it. The time that is left goes by
    samples: while the batch grows, steps become longer.
    """

    def __init__(self, train: TrainConfig, console: Console, steps_before: int = 0, samples_before: int = 0) -> None:
        self._train, self._console, self._steps_before = train, console, steps_before
        self._samples = self._samples_before = samples_before
        self._samples_in_all = samples_after(train, train.num_steps - steps_before, samples_before)
        self._elapsed_s = 0.0
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn(f"step {{task.fields[step]}}/{train.num_steps}"),
                BarColumn(),
                TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s  ETA"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task(
                "", total=self._samples_in_all, completed=samples_before, step=steps_before, loss="-", speed="-"
            )
            self._bar.start()

    def write(self, record: StepRecord) -> None:
        self._elapsed_s += record.step_time_s
        self._samples += batch_size_at(self._train, self._samples)
        if self._bar is not None:
            speed = f"{record.tokens_per_s:,.0f}"
            loss = f"{record.loss:.4f}"
            self._bar.update(self._task, completed=self._samples, step=record.step, loss=loss, speed=speed)
        ends = (self._steps_before + 1, self._train.num_steps)
        is_due = record.step % self._train.log_interval == 0 or record.step in ends
        if record.was_skipped:
            self._console.print(_skipped(record), highlight=False, soft_wrap=True)
        if record.valid_loss is not None or (is_due and self._bar is None and not record.was_skipped):
            self._console.print(self._line(record), highlight=False, soft_wrap=True)

    def close(self, succeeded: bool) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _line(self, record: StepRecord) -> str:
        width = len(str(self._train.num_steps))
        parts = [
            f"step {record.step:>{width}}/{self._train.num_steps}",
            f"loss {record.loss:.4f}",
            f"grad norm {record.grad_norm:.3f}",
            f"lr {record.lr:.2e}",
            f"{record.tokens_per_s:,.0f} tokens/s",
            f"mfu {record.mfu:.0%}",
        ]
        if record.valid_loss is not None:
            parts.append(f"valid loss {record.valid_loss:.4f}")
        if record.valid_bits_per_byte is not None:
            parts.append(f"{record.valid_bits_per_byte:.3f} bits/byte")
        done, left = self._samples - self._samples_before, self._samples_in_all - self._samples
        left_s = self._elapsed_s / done * left
        if left_s:
            parts.append(f"ETA {timedelta(seconds=round(left_s))}")
        return "  ".join(parts)


def _skipped(record: StepRecord) -> str:
    what = "a gradient" if math.isfinite(record.loss) else "the loss"
    return (
        f"step {record.step}: skipped, as {what} overflowed in fp16 at a loss scale of {record.loss_scale:g}; "
        f"{record.skipped_steps} of the run's steps are skipped so far"
    )
