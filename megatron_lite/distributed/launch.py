"""Start the ranks of one host from one command, through torchrun's agent, and end them together.

    exit_code = launch_local("megatron_lite.train.loop:run", (config,), nproc=8)

Every rank calls the function with torchrun's variables in its environment, so code that joins a world under torchrun
joins this one. The ranks are forked from a process that has imported torch once. Rank 0 has the terminal; the others
write to files. Whatever ends a rank ends all of them within seconds, with one message and a nonzero exit code.

`rank.run_rank` is what each rank goes through, and what a process that another launcher started goes through too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib
import logging
import multiprocessing
import multiprocessing.forkserver
import os
import select
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_lite.distributed.environments import HERE_VARIABLE
from megatron_lite.distributed.hosts import use_loopback
from megatron_lite.distributed.rank import (
    EXIT_FAILURE,
    RankEnd,
    describe,
    end_of_failure,
    exit_code_of,
    log_path,
    read_error_files,
    run_rank,
)

PORT_REMEDY = "choose another with --port, or leave it out: a free one is taken"
AGENT_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
# How long ranks may take to end after a signal, before they are killed: they finish their step and write a checkpoint.
STOP_GRACE_S = 600.0
# And after one of them has failed: a rank that is stopped would hear of nothing.
FAILURE_GRACE_S = 15.0
# One press of Ctrl-C reaches the launcher and the ranks, and the launcher passes it on; some press it a few times.
# Within this time of the first signal another one is the same wish; a later one is to end at once.
SAME_WISH_S = 2.0
PRELOAD = ("torch.distributed.device_mesh", "torch.distributed.elastic.multiprocessing.api", __name__)


class _Stopped(BaseException):
    """A signal that came before the agent takes them. Not an error, which the agent's own code might handle."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


@dataclass(frozen=True)
class _Task:
    """What a rank needs to know beyond its environment. Crosses to it by pickle."""

    target: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    log_dir: str
    done_dir: str
    lifeline: Connection
    stopping: Connection


def launch_local(
    target: str,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    nproc: int,
    port: int | None = None,
    log_dir: Path | None = None,
    preload: Sequence[str] = (),
    grace_s: float = STOP_GRACE_S,
    keeps_state: bool = False,
) -> int:
    """Call the function `target` ("module:function") in `nproc` processes of this host; returns the exit code.

    0: every rank returned None or 0. 2: a user's error (`faults.is_user_error`), of which only the message is printed.
    1: anything else; printed are the rank, how it ended and its traceback or the end of its output. 128 and its number:
    the signal that stopped the ranks; but 75 for SIGTERM and SIGUSR1 where the function `keeps_state`, so that it can
    be called again, and no rank failed or had to be killed. Another int that a rank returned: that int. All ranks have
    ended when this returns.

    `args` and `kwargs` are pickled. The agent serves the rendezvous at `port`, by default a free one. What ranks 1
    and up print goes to `log_dir`/rank<k>.log (default: nowhere, but for what a failure needs). `preload` names
    modules to import before the ranks are forked; the first launch of a process decides them. `grace_s`: how long the
    ranks may take to end after a signal. To be called from the main thread: the agent handles signals.

    Raises ValueError if `nproc` is not positive or the port is out of range or in use.
    """
    if nproc < 1:
        raise ValueError(f"nproc is {nproc}; it must be at least 1")
    if port is not None:
        _check_port(port)
    use_loopback()
    multiprocessing.set_forkserver_preload([*PRELOAD, *preload])
    receiver, lifeline = multiprocessing.Pipe(duplex=False)
    stopping, stop = multiprocessing.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="megatron_lite_launch_") as scratch, receiver, lifeline, stopping, stop:
        logs = Path(scratch, "logs") if log_dir is None else log_dir
        logs.mkdir(parents=True, exist_ok=True)
        hurry, errors, done = threading.Event(), Path(scratch, "errors"), Path(scratch, "done")
        done.mkdir()
        task = _Task(target, tuple(args), dict(kwargs or {}), str(logs), str(done), receiver, stopping)
        with _agent_surroundings(), _no_rank_left(grace_s, hurry, errors, stop):
            try:
                _start_fork_server()
                end = _run_agent(task, nproc, port, errors, grace_s)
            except _Stopped as stopped:
                end = stopped.signal
        if isinstance(end, signal.Signals) and len(list(done.iterdir())) == nproc:
            return 0  # it came too late to stop anything
        if isinstance(end, signal.Signals):
            print(f"stopped by {end.name}; all {nproc} ranks have ended", file=sys.stderr)
            failure = next((one for one in read_error_files(errors) if one.exit_code != exit_code_of(end)), None)
            if failure is None or hurry.is_set() or not keeps_state:
                return exit_code_of(end) if keeps_state and not hurry.is_set() else 128 + end.value
            end = failure
        if end is None:
            return 0
        message = describe(end, nproc, logs)
        if message and log_dir is not None and nproc > 1 and not end.is_user_error:
            message += f"\nthe output of ranks 1 and up is in {log_dir}"
        if message:
            print(message, file=sys.stderr)
        return end.exit_code if end.exit_code > 0 else EXIT_FAILURE


def _start_fork_server() -> None:
    """It imports torch while this process imports torch's agent, which is why that import is not at the top.

    A signal to the whole process group reaches it too, and it has to outlive the ranks: signals that are blocked when
    a process is started stay so in it and in its children, which let them in again (`_rank_main`). The tracker of
    shared resources is started first, for its start opens them here.
    """
    for start in (resource_tracker.ensure_running, multiprocessing.forkserver.ensure_running):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, AGENT_SIGNALS)
        try:
            start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def is_launched_here() -> bool:
    """Whether this process is a rank of `launch_local`, whose launcher speaks for all of them."""
    return HERE_VARIABLE in os.environ


def _check_port(port: int) -> None:
    if not 1 <= port <= 65535:
        raise ValueError(f"port {port} is not between 1 and 65535; {PORT_REMEDY}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
            raise ValueError(f"port {port} {reason}; {PORT_REMEDY}") from None


@contextlib.contextmanager
def _agent_surroundings() -> Iterator[None]:
    """Ends the block by `_Stopped` where a signal comes before the agent takes them, and undoes what the agent does to
    its process: signal handlers, and a log of each failure on the console."""
    disabled = logging.root.manager.disable
    handlers = {number: signal.signal(number, _stop) for number in AGENT_SIGNALS}
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if sys.stdout.isatty():
            print("\x1b[?25h", end="", flush=True)  # a progress bar that was cut short leaves the cursor hidden


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stopped(number)


@contextlib.contextmanager
def _no_rank_left(grace_s: float, hurry: threading.Event, errors: Path, stop: Connection) -> Iterator[None]:
    """Sees to it that all ranks have ended when the block has, however many signals come.

    After the first one the agent waits for its ranks, which may be writing a checkpoint; after the third it leaves
    them. Within `SAME_WISH_S` of the first, all are one wish, and the ranks are waited for; a later one ends every rank
    at once, also one that is stuck (`is_impatient`), and sets `hurry`, and so does the end of `grace_s`. Where a rank
    has failed, as the files in `errors` say, the others have `FAILURE_GRACE_S`. A thread takes the time, whatever the
    main thread does. It closes `stop` at the first signal.
    """
    others = set(multiprocessing.active_children())

    def left() -> set[multiprocessing.process.BaseProcess]:
        return set(multiprocessing.active_children()) - others

    def end_at_once() -> None:
        for child in left():
            hurry.set()
            child.kill()

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    arguments = (reader, end_at_once, errors, stop)
    watch = threading.Thread(target=_watch, args=arguments, name="launcher signals", daemon=True)
    watch.start()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        for number in AGENT_SIGNALS:
            signal.signal(number, _leave_to_thread)
        deadline = time.monotonic() + grace_s
        for child in left():
            child.terminate()  # the agent may have been too late to tell it; for others it is the same wish
        for child in left():
            child.join(max(0.0, deadline - time.monotonic()))
        end_at_once()
        signal.set_wakeup_fd(before)
        os.close(writer)
        watch.join()
        os.close(reader)


def _watch(reader: int, end_at_once: Callable[[], None], errors: Path, stop: Connection) -> None:
    first, since, failed = 0, 0.0, 0.0
    while True:
        if not select.select([reader], [], [], 1.0)[0]:
            if not first and not failed and read_error_files(errors):
                failed = time.monotonic()
            if failed and time.monotonic() - failed > FAILURE_GRACE_S:
                end_at_once()
            continue
        numbers = os.read(reader, 64)
        if not numbers:
            return
        for number in (number for number in numbers if number in AGENT_SIGNALS):
            if not first:
                first, since = number, time.monotonic()
                say_stopping(number)
                stop.close()
            elif is_impatient(number, first, time.monotonic() - since):
                end_at_once()


def is_impatient(number: int, first: int, seconds: float) -> bool:
    """Whether a signal that came some seconds after the first asks to end at once, and not just once more.

    Schedulers send SIGTERM after SIGUSR1, and again, while a checkpoint may still be written.
    """
    return seconds > SAME_WISH_S and number != signal.SIGUSR1 and (number != signal.SIGTERM or first == number)


def say_stopping(number: int) -> None:
    """Tells the terminal that a signal was heard."""
    with contextlib.suppress(OSError, ValueError):  # a terminal that is gone cannot be told
        print(f"{signal.Signals(number).name}: stopping; once more ends at once", file=sys.stderr, flush=True)


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    pass


def _run_agent(
    task: _Task, nproc: int, port: int | None, error_dir: Path, grace_s: float
) -> RankEnd | signal.Signals | None:
    """Run the ranks to their end: None if all is well, the signal that stopped this process, or how a rank failed."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    handled = ",".join(number.name for number in AGENT_SIGNALS)
    wanted: dict[str, Any] = {"shutdown_timeout": max(1, round(grace_s)), "signals_to_handle": handled}
    # Not every torch has the first field; it then waits for 30 seconds.
    known = {field.name for field in dataclasses.fields(LaunchConfig)}
    config = LaunchConfig(
        **{name: value for name, value in wanted.items() if name in known},
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id="local",
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{port or 0}",
        rdzv_configs={"is_host": True, "timeout": 60},
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=str(error_dir)),
    )
    try:
        elastic_launch(config, _rank_main)(task)
    except ChildFailedError as error:
        return end_of_failure(*error.get_first_failure())
    except RendezvousConnectionError as error:  # the port was free when it was checked
        raise ValueError(f"port {port} cannot be used ({error.__cause__}); {PORT_REMEDY}") from error
    except SignalException as error:
        return error.sigval
    return None


def _rank_main(task: _Task) -> None:
    """The life of a rank, from its fork to its end. A failure leaves at once, whatever threads still run."""
    # The default action works even while the process waits inside a collective, where no Python handler would run.
    # A function that has something to keep takes the signals over while it does (`megatron_lite.train.stop`).
    for number in AGENT_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, AGENT_SIGNALS)
    threading.Thread(target=_end_with_agent, args=(task.lifeline,), daemon=True).start()
    rank = int(os.environ["RANK"])
    os.environ[HERE_VARIABLE] = "1"
    if rank > 0:
        output = os.open(log_path(Path(task.log_dir), rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
    exit_code = run_rank(_call, (task.target, task.args, task.kwargs))
    sys.stdout.flush()
    sys.stderr.flush()
    if exit_code:
        os._exit(exit_code)
    Path(task.done_dir, str(rank)).touch()
    threading.Thread(target=_end_when_stopping, args=(task.stopping,), daemon=True).start()


def _call(target: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)(*args, **kwargs)


def _end_when_stopping(stopping: Connection) -> None:
    """Ends this process, which is done, when the launcher is stopping: the agent then waits for it. Else it is this one
    that waits for the agent."""
    with contextlib.suppress(EOFError, OSError):
        stopping.recv_bytes()
    os._exit(0)


def _end_with_agent(lifeline: Connection) -> None:
    """End this process when the agent's end of the pipe closes: the agent is gone, even if it was killed."""
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv_bytes()
    os.kill(os.getpid(), signal.SIGKILL)
