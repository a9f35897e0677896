"""Ctrl-C and SIGTERM while a run trains: noted at once, and acted on at the end of a step, when its state can be kept.

A handler in Python runs between two bytecodes of the main thread, which may wait in a collective for minutes. So the
handlers do nothing; the number of each signal also comes out of a pipe (`signal.set_wakeup_fd`), where a thread reads.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType

from megatron_lite.distributed.faults import lost_a_peer
from megatron_lite.distributed.launch import SAME_WISH_S, is_launched, say_stopping

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = "\x1b[?25h"


class StopSignals:
    """Takes over SIGINT and SIGTERM for the length of a `with` block. For the main thread; in others it does nothing.

    ``requested`` is the number of the first signal, 0 until one comes. Another one `SAME_WISH_S` later ends the process
    at once, with exit code 128 + its number, whatever the main thread does.

    announce: whether this rank says on stderr that it has heard. A rank of `launch_local` leaves that to the launcher,
    which ends ranks by SIGTERM also when one of them has died.
    """

    def __init__(self, *, announce: bool) -> None:
        self.requested = 0
        self._announce = announce and not is_launched()
        self._since = 0.0

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
        while numbers := os.read(self._reader, 64):
            for number in numbers:
                if number in SIGNALS:
                    self._note(number)

    def _note(self, number: int) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._since = number, now
            if self._announce:
                say_stopping(number)
        elif now - self._since > SAME_WISH_S:
            with contextlib.suppress(OSError, ValueError):
                if sys.stdout.isatty():
                    os.write(1, _SHOW_CURSOR.encode())  # a progress bar hides it
            os._exit(128 + number)


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    pass
