"""`megatron-lite train` in processes of its own: started, watched, and ended in every way there is."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from megatron_lite.utils import run_files
from tests.train.tiny_run import keys

PROGRAM = [sys.executable, "-m", "megatron_lite"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def write_config(folder: Path, corpus: Path, name: str = "tiny", *more: str) -> Path:
    """The tiny run as a file."""
    sections: dict[str, list[str]] = {}
    for key in keys(corpus, folder / "runs", name, *more):
        dotted, _, value = key.partition("=")
        section, _, leaf = dotted.partition(".")
        lines = sections.setdefault(section, [])
        lines[:] = [line for line in lines if not line.startswith(f"  {leaf}:")] + [f"  {leaf}: {value}"]
    path = folder / f"{name}.yaml"
    path.write_text("\n".join(line for name, lines in sections.items() for line in (f"{name}:", *lines)) + "\n")
    return path


class Job:
    """A training command and all its processes, which are a process group; its output goes to a file."""

    def __init__(self, config: Path, *args: object, program: list[str] | None = None) -> None:
        self.log = config.with_suffix(f".{time.monotonic_ns()}.log")
        self.metrics = config.parent / "runs" / config.stem / run_files.METRICS
        self.checkpoints = self.metrics.parent / run_files.CHECKPOINTS
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [*(program or PROGRAM), "train", str(config), *map(str, args)],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=dict(os.environ, TMPDIR=str(config.parent)),  # what is killed cannot clean up
            )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """SIGKILL to every process of the job at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def num_records(self) -> int:
        return self.metrics.read_bytes().count(b"\n") if self.metrics.exists() else 0

    def wait_for(self, condition: Callable[[], bool], timeout: float = 120) -> None:
        """Until the condition holds; polls as often as it can, so that a short moment is not missed."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, f"it ended with {self.process.returncode}:\n{self.said()}"
            assert time.monotonic() < deadline, f"it did not happen:\n{self.said()}"
            time.sleep(0.002)

    def wait(self, timeout: float = 120) -> int:
        return self.process.wait(timeout)
