"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_lite.train.metrics import StepRecord


class ConsoleSink:
    """Shows records on ``console``; on no terminal, one line every ``log_interval`` steps and after an evaluation.

    steps_before: steps that the run took before this process went on with it.
    """

    def __init__(self, num_steps: int, log_interval: int, console: Console, steps_before: int = 0) -> None:
        self._num_steps, self._log_interval, self._console = num_steps, log_interval, console
        self._steps_before = steps_before
        self._elapsed_s = 0.0
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s  ETA"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("", total=num_steps, completed=steps_before, loss="-", speed="-")
            self._bar.start()

    def write(self, record: StepRecord) -> None:
        self._elapsed_s += record.step_time_s
        if self._bar is not None:
            speed = f"{record.tokens_per_s:,.0f}"
            self._bar.update(self._task, completed=record.step, loss=f"{record.loss:.4f}", speed=speed)
        is_due = record.step % self._log_interval == 0 or record.step in (self._steps_before + 1, self._num_steps)
        if record.valid_loss is not None or (is_due and self._bar is None):
            self._console.print(self._line(record), highlight=False, soft_wrap=True)

    def close(self, succeeded: bool) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _line(self, record: StepRecord) -> str:
        width = len(str(self._num_steps))
        parts = [
            f"step {record.step:>{width}}/{self._num_steps}",
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
        left_s = self._elapsed_s / (record.step - self._steps_before) * (self._num_steps - record.step)
        if left_s:
            parts.append(f"ETA {timedelta(seconds=round(left_s))}")
        return "  ".join(parts)
