"""A pool of processes that run a function as a world of ranks, at a fraction of a second for each world.

    with WorkerPool(max_workers=8) as pool:
        losses = pool.run(train_a_few_steps, 4, config, timeout_s=120)   # one result per rank, in rank order

Workers are forked from a zygote that has imported torch already. Each call is a world of its own: a fresh store, a
fresh default process group (gloo over loopback), a timeout on every collective. A rank that raises, dies or hangs ends
the call with one error that names the rank and shows why; the workers of that call are then replaced by fresh forks.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_lite.distributed.faults import lost_a_peer
from megatron_lite.distributed.worker import (
    DUMP_STACK_SIGNAL,
    FORK,
    WAIT,
    Failure,
    Job,
    Success,
    output_path,
    pack,
    stack_path,
    unpack,
)

# How long to listen for the peers of a failed rank, and to wait for stacks, before they are killed.
PEER_GRACE_S = 0.3
STACK_GRACE_S = 2.0
# The pool's own timeout comes first, so that a hang shows every rank's stack and not one rank's failed collective.
COLLECTIVE_TIMEOUT_MARGIN_S = 30.0
OUTPUT_TAIL_LINES = 20
DEFAULT_PRELOAD = ("numpy", "torch.distributed.device_mesh", "megatron_lite.distributed.worker")


@dataclass(frozen=True)
class RankFailure:
    """Why one rank failed. `details` is its traceback, or the end of what it printed if it died without one."""

    rank: int
    summary: str
    details: str
    is_consequence: bool


class WorkerError(RuntimeError):
    """At least one rank raised or died. `failures` has the root cause first and what followed from it last."""

    def __init__(self, function_name: str, world_size: int, failures: Sequence[RankFailure]) -> None:
        self.failures = tuple(failures)
        self.rank = self.failures[0].rank
        first = self.failures[0]
        lines = [f"rank {first.rank} of {world_size} failed in {function_name}: {first.summary}"]
        lines.append(first.details.rstrip())
        for other in self.failures[1:]:
            note = " (a consequence)" if other.is_consequence else ""
            lines.append(f"rank {other.rank}{note}: {other.summary}")
        super().__init__("\n".join(line for line in lines if line))


class WorkerTimeout(WorkerError):
    """At least one rank did not return in time; `failures` has the stack of each rank that was still running."""

    def __init__(self, function_name: str, world_size: int, timeout_s: float, failures: Sequence[RankFailure]) -> None:
        self.failures = tuple(failures)
        self.rank = self.failures[0].rank
        ranks = ", ".join(str(failure.rank) for failure in self.failures)
        lines = [f"{function_name} did not end within {timeout_s:g} s; still running of {world_size} ranks: {ranks}"]
        for failure in self.failures:
            lines.append(f"--- rank {failure.rank}: {failure.summary}\n{failure.details.rstrip()}")
        RuntimeError.__init__(self, "\n".join(lines))


_Replies = dict[int, Success | Failure | None]


@dataclass(frozen=True)
class _Worker:
    pid: int
    channel: Connection


class _Zygote:
    """The process that forks workers: start, ask, stop."""

    def __init__(self, preload: Sequence[str], folder: Path) -> None:
        ours, theirs = socket.socketpair()
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; from megatron_lite.distributed.worker import zygote_main; "
            f"zygote_main({theirs.fileno()}, {tuple(preload)!r}, {str(folder)!r})"
        )
        # A session of its own: Ctrl-C in the terminal goes to the pool's owner alone, who then closes the pool.
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        self._control = ours
        self._exit_statuses: dict[int, int] = {}

    def fork(self) -> _Worker:
        ours, theirs = Pipe(duplex=True)
        socket.send_fds(self._control, [FORK], [theirs.fileno()])
        theirs.close()
        pid = self._answer()
        self._exit_statuses.pop(pid, None)
        return _Worker(pid, ours)

    def end(self, pid: int) -> int:
        """Kill a worker unless it has ended already; returns its exit status, negative for a signal. Idempotent."""
        if pid not in self._exit_statuses:
            os.kill(pid, signal.SIGKILL)  # not reaped yet, so the number is still this worker's
            self._control.sendall(WAIT + pid.to_bytes(8, "little"))
            self._exit_statuses[pid] = os.waitstatus_to_exitcode(self._answer())
        return self._exit_statuses[pid]

    def stop(self) -> None:
        self._control.shutdown(socket.SHUT_RDWR)  # ends the conversation even if a fork of this process shares it
        self._control.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _answer(self) -> int:
        data = self._control.recv(8, socket.MSG_WAITALL)
        if len(data) != 8:
            raise RuntimeError(f"the process that forks workers ended (exit status {self.process.wait(timeout=10)})")
        return int.from_bytes(data, "little")


class WorkerPool:
    """Up to `max_workers` processes, forked when first needed. Use as a context manager or call `close`.

    `preload` names modules that the zygote imports before it forks; a world that needs one of them pays for it once.
    The pool is meant for one thread. It keeps no state outside of itself: several pools may live side by side.
    """

    def __init__(self, max_workers: int = 8, *, preload: Sequence[str] = ()) -> None:
        if max_workers < 1:
            raise ValueError(f"max_workers is {max_workers}; it must be at least 1")
        self.max_workers = max_workers
        self._folder = Path(tempfile.mkdtemp(prefix="megatron_lite_pool_"))
        self._zygote = _Zygote((*DEFAULT_PRELOAD, *preload), self._folder)
        self._workers: list[_Worker] = []
        self._job_numbers = itertools.count()
        self._finalizer = weakref.finalize(self, _close, os.getpid(), self._zygote, self._workers, self._folder)

    def run(
        self,
        function: Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout_s: float = 60.0,
        threads: int = 1,
        **kwargs: Any,
    ) -> list[Any]:
        """Call `function(*args, **kwargs)` in ranks 0 .. world_size-1 of a new process group; returns their results.

        The function must be importable (not a lambda, not defined in `__main__`); arguments and results are pickled,
        tensors among them arrive as plain CPU tensors. In a worker `torch.distributed` is initialised (gloo) and torch
        uses `threads` threads; the function's output goes to a file whose end is shown if the rank fails.

        Raises `WorkerError` if a rank raises or dies, `WorkerTimeout` if one is still running after `timeout_s`
        seconds, `ValueError` for a world that is too large or a function that cannot be sent.
        """
        if not 1 <= world_size <= self.max_workers:
            raise ValueError(f"world_size is {world_size}; this pool has 1 .. {self.max_workers} workers")
        if not self._finalizer.alive:
            raise ValueError("the pool is closed")
        name = getattr(function, "__qualname__", repr(function))
        call = _pack_call(function, args, kwargs)
        while len(self._workers) < world_size:
            self._workers.append(self._zygote.fork())
        ranks = self._workers[:world_size]
        store_path = self._folder / f"store-{next(self._job_numbers)}"
        patience_s, paths = timeout_s + COLLECTIVE_TIMEOUT_MARGIN_S, tuple(sys.path)
        for rank, worker in enumerate(ranks):
            job = Job(call, rank, world_size, str(store_path), patience_s, threads, paths, os.getcwd())
            with contextlib.suppress(OSError):  # a worker that has died meanwhile is found by _collect
                worker.channel.send_bytes(pickle.dumps(job))
        replies: _Replies = {}
        try:
            _collect(ranks, replies, deadline=time.monotonic() + timeout_s)
            if not all(isinstance(reply, Success) for reply in replies.values()):
                raise self._error(name, ranks, replies)
            if len(replies) < world_size:
                raise self._timeout_error(name, ranks, replies, timeout_s)
            for worker in ranks:
                worker.channel.send_bytes(b"")
        except BaseException:
            self._discard(world_size)
            raise
        finally:
            store_path.unlink(missing_ok=True)
        return [unpack(reply.value) for _, reply in sorted(replies.items()) if isinstance(reply, Success)]

    def close(self) -> None:
        """End all workers at once. Idempotent; also called when the pool is collected and at the interpreter's exit."""
        self._finalizer()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _discard(self, world_size: int) -> None:
        """Kill the workers of a call that failed: what state they are in, nobody knows."""
        for worker in self._workers[:world_size]:
            self._zygote.end(worker.pid)
            worker.channel.close()
            output_path(self._folder, worker.pid).unlink(missing_ok=True)
            stack_path(self._folder, worker.pid).unlink(missing_ok=True)
        del self._workers[:world_size]

    def _error(self, name: str, ranks: Sequence[_Worker], replies: _Replies) -> WorkerError:
        failures = []
        for rank, reply in replies.items():  # in order of arrival: the first to fail is the root cause
            if isinstance(reply, Failure):
                failures.append(RankFailure(rank, reply.summary, reply.traceback, lost_a_peer(reply.summary)))
            elif reply is None:
                status = self._zygote.end(ranks[rank].pid)
                how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
                tail = _tail(output_path(self._folder, ranks[rank].pid))
                failures.append(RankFailure(rank, f"the process {how}", tail, is_consequence=False))
        failures.sort(key=lambda failure: failure.is_consequence)
        return WorkerError(name, len(ranks), failures)

    def _timeout_error(self, name: str, ranks: Sequence[_Worker], replies: _Replies, timeout_s: float) -> WorkerTimeout:
        running = [rank for rank in range(len(ranks)) if rank not in replies]
        stacks = _dump_stacks([ranks[rank] for rank in running], self._folder)
        failures = [
            RankFailure(rank, "still running", stack or "no stack: the process does not respond", False)
            for rank, stack in zip(running, stacks, strict=True)
        ]
        return WorkerTimeout(name, len(ranks), timeout_s, failures)


def _close(owner: int, zygote: _Zygote, workers: list[_Worker], folder: Path) -> None:
    if os.getpid() != owner:  # the exit of a fork of the pool's process
        return
    zygote.stop()  # it kills its workers
    for worker in workers:
        worker.channel.close()
    shutil.rmtree(folder, ignore_errors=True)


def _pack_call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    name = getattr(function, "__qualname__", repr(function))
    if getattr(function, "__module__", None) == "__main__":
        raise ValueError(f"{name} is defined in __main__, which a worker cannot import; move it into a module")
    try:
        return pack((function, args, kwargs))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{name} or an argument of it cannot be sent to a worker ({error}); "
            "use a function at the top level of a module and arguments that pickle accepts"
        ) from error


def _collect(ranks: Sequence[_Worker], replies: _Replies, deadline: float) -> None:
    """Fill `replies` in order of arrival (None: the rank died) until all have come or the deadline has passed.

    After a failure the peers have a short grace to report theirs; those that wait for the failed rank are left out.
    """
    waiting = {worker.channel: rank for rank, worker in enumerate(ranks)}
    has_failed = False
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for channel in ready:
            assert isinstance(channel, Connection)
            rank = waiting.pop(channel)
            try:
                reply: Success | Failure | None = pickle.loads(channel.recv_bytes())
            except (EOFError, OSError):
                reply = None
            replies[rank] = reply
            if not isinstance(reply, Success) and not has_failed:
                has_failed = True
                deadline = time.monotonic() + PEER_GRACE_S


def _dump_stacks(workers: Sequence[_Worker], folder: Path) -> list[str]:
    """The Python stacks of running workers, by faulthandler; empty for one that does not answer the signal."""
    for worker in workers:
        os.kill(worker.pid, DUMP_STACK_SIGNAL)
    paths = [stack_path(folder, worker.pid) for worker in workers]
    deadline = time.monotonic() + STACK_GRACE_S
    previous: list[str] | None = None
    while time.monotonic() < deadline:
        time.sleep(0.1)
        stacks = [path.read_text(errors="replace") if path.exists() else "" for path in paths]
        if all(stacks) and stacks == previous:
            return stacks
        previous = stacks
    return previous or [""] * len(workers)


def _tail(path: Path) -> str:
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-OUTPUT_TAIL_LINES:])
    except OSError:
        return ""
