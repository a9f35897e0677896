"""Ctrl-C, SIGTERM and SIGUSR1 to a run: noted at once, and acted on at the end of a step, when its state can be kept.

A handler in Python runs between two bytecodes of the main thread, which may wait in a collective for minutes. So the
handlers do nothing; the number of each signal also comes out of a pipe (`signal.set_wakeup_fd`), where a thread reads.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType

from megatron_lite.distributed.faults import lost_a_peer
from megatron_lite.distributed.launch import STOP_GRACE_S, is_impatient, is_launched_here, say_stopping
from megatron_lite.distributed.rank import exit_code_of

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_SHOW_CURSOR = "\x1b[?25h"


class Stopped(Exception):
    """The run was stopped before its first step: there is nothing new to keep. Every rank raises it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} before the first step")
        self.number = number


class StopSignals:
    """Takes over the signals for the length of a `with` block. For the main thread; in others it does nothing.

    Until `hold` is called nothing is there to be kept, and the first signal ends the process at once, with the exit
    code of a stop (`rank.exit_code_of`). From then on it is noted, and ``requested`` is its number, 0 until one comes.
    The process is then ended with 128 and the number, whatever the main thread does, when another one asks for it
    (`launch.is_impatient`) or when the grace time is over.

    ``has_begun``: whether a step has, after which a stop leaves a checkpoint; the run sets it.

    announce: whether this rank says on stderr that it has heard. A rank of `launch_local` leaves that to the launcher,
    which ends ranks by SIGTERM also when one of them has died.
    """

    def __init__(self, *, announce: bool) -> None:
        self.requested, self.has_begun = 0, False
        self.announce = announce and not is_launched_here()
        self._since, self._grace_s = 0.0, STOP_GRACE_S
        self._early: Callable[[int], None] | None = _nothing
        self._lock = threading.Lock()

    def before_exit(self, action: Callable[[int], None]) -> None:
        """What to do with the number of a signal that ends the process at once, as nothing is held yet."""
        with self._lock:
            self._early = action

    def hold(self, grace_s: float) -> None:
        """From here on a signal is noted: the ranks know one another, and have to stop together."""
        with self._lock:
            self._early, self._grace_s = None, grace_s

    def __enter__(self) -> StopSignals:
        self._active = threading.current_thread() is threading.main_thread()
        if self._active:
            self._reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._handlers = {number: signal.signal(number, _leave_to_thread) for number in SIGNALS}
            self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._watch, name="stop signals", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._active:
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._writer)
        self._thread.join()
        os.close(self._reader)
        # A launcher ends ranks by SIGTERM when one of them has died. This rank has then lost a peer before it could
        # stop in order, and ends by the signal, as it would have without this class.
        is_ended = self.requested and error is not None and lost_a_peer(str(error))
        if is_ended and signal.getsignal(self.requested) is signal.SIG_DFL:
            os.kill(os.getpid(), self.requested)

    def _watch(self) -> None:
        while True:
            left = self._since + self._grace_s - time.monotonic() if self.requested else None
            if left is not None and left <= 0:
                self._say(f"the run could not stop within {self._grace_s:g} s; its last checkpoint stands")
                _exit(128 + self.requested)
            if not select.select([self._reader], [], [], left)[0]:
                continue
            numbers = os.read(self._reader, 64)
            if not numbers:
                return
            for number in numbers:
                if number in SIGNALS:
                    self._note(number)

    def _note(self, number: int) -> None:
        with self._lock:
            if self._early is not None:
                self._early(number)
                self._say(f"stopped by {signal.Signals(number).name} before the first step; nothing is lost")
                _exit(exit_code_of(number))
            now = time.monotonic()
            if not self.requested:
                self.requested, self._since = number, now
                if self.announce:
                    say_stopping(number)
            elif is_impatient(number, self.requested, now - self._since):
                _exit(128 + number)

    def _say(self, message: str) -> None:
        if self.announce:
            with contextlib.suppress(OSError, ValueError):
                print(message, file=sys.stderr, flush=True)


def write_requeue(path: Path, number: int, step: int | None, checkpoint: Path | None) -> None:
    """Tells a job script that the run is to be started again: torchrun's agent ends with 1, whatever its ranks say.

    One line: the signal, the steps taken, and the checkpoint that they are in (a dash where there is none). Ctrl-C is a
    person's wish, and leaves no such file. A disk that is full is no reason to end otherwise.
    """
    if number == signal.SIGINT:
        return
    line = f"{signal.Signals(number).name} {'-' if step is None else step} {checkpoint or '-'}\n"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(line, encoding="utf-8")


def _exit(code: int) -> None:
    with contextlib.suppress(OSError, ValueError):
        if sys.stdout.isatty():
            os.write(1, _SHOW_CURSOR.encode())  # a progress bar hides it
    os._exit(code)


def _nothing(number: int) -> None:
    pass


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    pass
