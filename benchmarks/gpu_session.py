"""How benchmarks/gpu.py runs its parts: processes with limits, and a report that is on disk whenever it ends."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TAIL_CHARACTERS = 2000
MINIMUM_S = 1.0  # with less than this left nothing is started


class PartFailed(RuntimeError):
    """What a part ran failed; the message is the end of what it printed."""

    state = "failed"


class CutOff(PartFailed):
    """What a part ran was not done when its time was up, or had no time at all."""

    state = "cut off"


class NotHere(PartFailed):
    """A part needs what this machine does not have, and what the package does not bring: no fault of the package."""

    state = "not here"


@dataclass
class Session:
    """One run of benchmarks/gpu.py: where it writes, what it may take, and what it has found.

    deadline: of whatever runs now, on the clock of time.monotonic. stopped: nothing more is started.
    """

    out: Path
    smoke: bool
    deadline: float
    report: dict[str, Any] = field(default_factory=lambda: {"parts": {}})
    running: set[subprocess.Popen[str]] = field(default_factory=set)
    stopped: bool = False

    @property
    def device(self) -> str:
        return "cpu" if self.smoke else "cuda"

    def left(self) -> float:
        return -math.inf if self.stopped else self.deadline - time.monotonic()

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """What runs inside may take that long, and no longer than the time that was left before."""
        before = self.deadline
        self.deadline = min(before, time.monotonic() + seconds)
        try:
            yield
        finally:
            self.deadline = before

    def python(self, *arguments: str, limit_s: float = math.inf, **environment: str) -> str:
        return self.run([sys.executable, *arguments], limit_s=limit_s, **environment)

    def run(self, command: Sequence[str], *, limit_s: float = math.inf, **environment: str) -> str:
        """What the command prints. Raises PartFailed when it fails, CutOff when it does not end within the limit."""
        everything = {**os.environ, **environment}
        pipe = subprocess.PIPE
        limit = min(limit_s, self.left())
        if limit <= MINIMUM_S:
            raise CutOff("left out: no time was left for it")
        try:  # a session of its own: what it starts, such as the workers of torch.compile, ends with it
            started = subprocess.Popen(
                command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env=everything, start_new_session=True
            )
        except OSError as error:
            raise PartFailed(f"{command[0]} does not run: {error.strerror}") from error
        self.running.add(started)
        if self.stopped:  # while it was being started: `stop` did not know of it
            _end(started)
        try:
            printed, complained = started.communicate(timeout=limit)
        except subprocess.TimeoutExpired as error:
            _end(started)
            started.communicate()
            raise CutOff(f"cut off after {limit:.0f} s: {' '.join(command[1:])}") from error
        finally:
            self.running.discard(started)
        if started.returncode != 0:
            if self.stopped:
                raise CutOff(f"cut off when the run was ended: {' '.join(command[1:])}")
            tail = (printed + complained).strip()[-TAIL_CHARACTERS:]
            raise PartFailed(f"exit code {started.returncode}: {' '.join(command[1:])}\n{tail}")
        return printed

    def stop(self) -> None:
        """Ends all that runs; nothing more is started. For a handler of signals: it takes no lock, which the code that
        it interrupts might hold, and what it does not see in `running` yet is ended by `run`."""
        self.stopped = True
        for process in list(self.running):
            _end(process)

    def write(self) -> None:
        """gpu.json as it is so far: whole or not at all, since this process may be killed at any time."""
        partial = self.out / "gpu.json.partial"
        partial.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.out / "gpu.json")


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended just now
        os.killpg(process.pid, signal.SIGKILL)


def attempt(function: Callable[[], Any]) -> dict[str, Any]:
    """{"ok", "seconds", and "result" or "error"} of a call that may fail in any way; "state" says in which."""
    started = time.monotonic()
    try:
        result = {"ok": True, "state": "done", "result": function()}
    except PartFailed as error:
        result = {"ok": False, "state": error.state, "error": str(error)}
    except Exception as error:
        result = {"ok": False, "state": "failed", "error": f"{type(error).__name__}: {error}"}
    return {**result, "seconds": round(time.monotonic() - started, 1)}


def each(session: Session, names: Sequence[str], function: Callable[[str, float], Any], workers: int) -> dict[str, Any]:
    """`attempt` for every name, `workers` at a time. function(name, limit_s) gets a fair share of the time left: what
    earlier ones did not take goes to later ones, and one that hangs does not take the time of the others."""
    taken = iter(range(len(names), 0, -1))
    lock = threading.Lock()

    def one(name: str) -> dict[str, Any]:
        with lock:
            remaining = next(taken)
        return attempt(lambda: function(name, session.left() / math.ceil(remaining / workers)))

    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))
