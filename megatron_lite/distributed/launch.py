"""Start the ranks of one host from one command, through torchrun's agent, and end them together.

    exit_code = launch_local("megatron_lite.train.loop:run", (config,), nproc=8)

Every rank calls the function with torchrun's variables in its environment, so code that joins a world under torchrun
joins this one. The ranks are forked from a process that has imported torch once. Rank 0 has the terminal; the others
write to files. Whatever ends a rank ends all of them within seconds, with one message and a nonzero exit code.

`run_rank` is what each rank goes through, and what a process started by torchrun itself should go through too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib
import json
import logging
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_lite.distributed.faults import LostPeer, is_user_error, lost_a_peer
from megatron_lite.distributed.hosts import use_loopback

EXIT_FAILURE, EXIT_USER_ERROR = 1, 2
# A rank that lost a peer waits this long before it ends, so that the agent sees first the one that went first.
LOST_PEER_PATIENCE_S = 5.0
PORT_REMEDY = "choose another with --port, or leave it out: a free one is taken"
LOG_TAIL_LINES = 30
AGENT_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
# How long ranks may take to end after a signal, before they are killed: they finish their step and write a checkpoint.
STOP_GRACE_S = 600
# One press of Ctrl-C reaches the launcher and the ranks, and the launcher passes it on; some press it a few times.
# Within this time of the first signal another one is the same wish; a later one is to end at once.
SAME_WISH_S = 2.0
# Set in the ranks of `launch_local`, whose errors the launching process prints.
QUIET_VARIABLE = "MEGATRON_LITE_LAUNCHED"
PRELOAD = ("torch.distributed.device_mesh", "torch.distributed.elastic.multiprocessing.api", __name__)


@dataclass(frozen=True)
class _Task:
    """What a rank needs to know beyond its environment. Crosses to it by pickle."""

    target: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    log_dir: str
    lifeline: Connection


@dataclass(frozen=True)
class _RankEnd:
    """How a rank ended. No summary: it returned a nonzero exit code by itself. No traceback: it died."""

    rank: int
    exit_code: int
    is_user_error: bool
    summary: str
    traceback: str


def launch_local(
    target: str,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    nproc: int,
    port: int | None = None,
    log_dir: Path | None = None,
    preload: Sequence[str] = (),
) -> int:
    """Call the function `target` ("module:function") in `nproc` processes of this host; returns the exit code.

    0: every rank returned None or 0. 2: a user's error (`faults.is_user_error`), of which only the message is printed.
    1: anything else; printed are the rank, how it ended and its traceback or the end of its output. 130 and 143:
    SIGINT and SIGTERM. Another int that a rank returned: that int. All ranks have ended when this returns.

    `args` and `kwargs` are pickled. The agent serves the rendezvous at `port`, by default a free one. What ranks 1
    and up print goes to `log_dir`/rank<k>.log (default: nowhere, but for what a failure needs). `preload` names
    modules to import before the ranks are forked; the first launch of a process decides them. To be called from the
    main thread: the agent handles signals.

    Raises ValueError if `nproc` is not positive or the port is out of range or in use.
    """
    if nproc < 1:
        raise ValueError(f"nproc is {nproc}; it must be at least 1")
    if port is not None:
        _check_port(port)
    use_loopback()
    # The fork server imports torch while this process imports torch's agent, which is why that import is below.
    multiprocessing.set_forkserver_preload([*PRELOAD, *preload])
    # Ctrl-C goes to all processes of a terminal. The fork server ends with this one, and has nothing to say about it.
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, interrupt)
    receiver, lifeline = multiprocessing.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="megatron_lite_launch_") as scratch, receiver, lifeline:
        logs = Path(scratch, "logs") if log_dir is None else log_dir
        logs.mkdir(parents=True, exist_ok=True)
        task = _Task(target, tuple(args), dict(kwargs or {}), str(logs), receiver)
        with _agent_surroundings(), _no_rank_left():
            end = _run_agent(task, nproc, port, Path(scratch, "errors"))
        if isinstance(end, signal.Signals):
            print(f"stopped by {end.name}; all {nproc} ranks have ended", file=sys.stderr)
            return 128 + end.value
        if end is None:
            return 0
        message = _describe(end, nproc, logs)
        if message and log_dir is not None and nproc > 1 and not end.is_user_error:
            message += f"\nthe output of ranks 1 and up is in {log_dir}"
        if message:
            print(message, file=sys.stderr)
        return end.exit_code if end.exit_code > 0 else EXIT_FAILURE


def run_rank(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
) -> int:
    """Call `function` as one rank (or as the only process) and return the exit code of this process.

    The code is what the function returns if that is an int, else 0; 2 for a user's error; 1 for any other. An error
    goes to the file that torchrun's agent reads (TORCHELASTIC_ERROR_FILE), if any, and to stderr: from local rank 0
    alone under torchrun, so that what every rank finds wrong is said once, and from no rank under `launch_local`,
    which says it itself. A rank that only lost a peer says in one line what it waited for, if it knows, and waits for
    the agent to end it, so as not to pose as the cause.
    """
    environ = os.environ if environ is None else environ
    is_alone = environ.get("WORLD_SIZE", "1") == "1"
    try:
        result = function(*args, **(kwargs or {}))
    except Exception as error:
        if not is_alone and lost_a_peer(str(error)):
            if isinstance(error, LostPeer):
                print(f"rank {environ.get('RANK')}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
            time.sleep(LOST_PEER_PATIENCE_S)
        end = _RankEnd(
            rank=int(environ.get("RANK", "0")),
            exit_code=EXIT_USER_ERROR if is_user_error(error) else EXIT_FAILURE,
            is_user_error=is_user_error(error),
            summary=str(error) if is_user_error(error) else f"{type(error).__name__}: {error}",
            traceback="" if is_user_error(error) else traceback.format_exc(),
        )
    else:
        code = result if isinstance(result, int) else 0
        end = _RankEnd(
            rank=int(environ.get("RANK", "0")), exit_code=code, is_user_error=False, summary="", traceback=""
        )
    if end.exit_code:
        is_written = _write_error_file(end, environ.get("TORCHELASTIC_ERROR_FILE", ""))
        message = _describe(end, int(environ.get("WORLD_SIZE", "1")), None)
        is_quiet = environ.get(QUIET_VARIABLE) is not None and is_written
        if message and environ.get("LOCAL_RANK", "0") == "0" and not is_quiet:
            print(message, file=sys.stderr)
    return end.exit_code


def is_launched() -> bool:
    """Whether this process is a rank of `launch_local`, whose launcher speaks for all of them."""
    return QUIET_VARIABLE in os.environ


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
    """Undo what the agent does to its process: signal handlers, and a log of each failure on the console."""
    disabled = logging.root.manager.disable
    handlers = {number: signal.getsignal(number) for number in AGENT_SIGNALS}
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if sys.stdout.isatty():
            print("\x1b[?25h", end="", flush=True)  # a progress bar that was cut short leaves the cursor hidden


@contextlib.contextmanager
def _no_rank_left() -> Iterator[None]:
    """Sees to it that all ranks have ended when the block has, however many signals come.

    After the first one the agent waits for its ranks, which may be writing a checkpoint; after the third it leaves
    them. Within `SAME_WISH_S` of the first, all are one wish, and the ranks are waited for; a later one ends every rank
    at once, also one that is stuck. A thread takes the time of signals, whatever the main thread does about them.
    """
    others = set(multiprocessing.active_children())

    def left() -> set[multiprocessing.process.BaseProcess]:
        return set(multiprocessing.active_children()) - others

    def end_at_once() -> None:
        for child in left():
            child.kill()

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    watch = threading.Thread(target=_watch_signals, args=(reader, end_at_once), name="launcher signals", daemon=True)
    watch.start()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        for number in AGENT_SIGNALS:
            signal.signal(number, _leave_to_thread)
        deadline = time.monotonic() + STOP_GRACE_S
        for child in left():
            child.terminate()  # the agent may have been too late to tell it; for others it is the same wish
        for child in left():
            child.join(max(0.0, deadline - time.monotonic()))
        end_at_once()
        signal.set_wakeup_fd(before)
        os.close(writer)
        watch.join()
        os.close(reader)


def _watch_signals(reader: int, end_at_once: Callable[[], None]) -> None:
    first = None
    while numbers := os.read(reader, 64):
        wishes = [number for number in numbers if number in AGENT_SIGNALS]
        if not wishes:
            continue
        now = time.monotonic()
        if first is None:
            first = now
            say_stopping(wishes[0])
        if now - first > SAME_WISH_S:
            end_at_once()


def say_stopping(number: int) -> None:
    """Tells the terminal that a signal was heard."""
    with contextlib.suppress(OSError, ValueError):  # a terminal that is gone cannot be told
        print(f"{signal.Signals(number).name}: stopping; once more ends at once", file=sys.stderr, flush=True)


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    pass


def _run_agent(task: _Task, nproc: int, port: int | None, error_dir: Path) -> _RankEnd | signal.Signals | None:
    """Run the ranks to their end: None if all is well, the signal that stopped this process, or how a rank failed."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Not every torch has the field; it then waits for 30 seconds.
    fields = {field.name for field in dataclasses.fields(LaunchConfig)}
    grace: dict[str, Any] = {"shutdown_timeout": STOP_GRACE_S} if "shutdown_timeout" in fields else {}
    config = LaunchConfig(
        **grace,
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
        rank, failure = error.get_first_failure()
        report = failure.error_file_data.get("megatron_lite")
        if report is not None:
            return _RankEnd(**report)
        return _RankEnd(
            rank, failure.exitcode, is_user_error=False, summary=_how_it_ended(failure.exitcode), traceback=""
        )
    except RendezvousConnectionError as error:  # the port was free when it was checked
        raise ValueError(f"port {port} cannot be used ({error.__cause__}); {PORT_REMEDY}") from error
    except SignalException as error:
        return error.sigval
    except KeyboardInterrupt:
        return signal.SIGINT
    return None


def _rank_main(task: _Task) -> None:
    """The life of a rank, from its fork to its end. A failure leaves at once, whatever threads still run."""
    # The default action works even while the process waits inside a collective, where no Python handler would run.
    # A function that has something to keep takes the signals over while it does (`megatron_lite.train.stop`).
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_agent, args=(task.lifeline,), daemon=True).start()
    rank = int(os.environ["RANK"])
    os.environ[QUIET_VARIABLE] = "1"
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


def _call(target: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)(*args, **kwargs)


def _end_with_agent(lifeline: Connection) -> None:
    """End this process when the agent's end of the pipe closes: the agent is gone, even if it was killed."""
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv_bytes()
    os.kill(os.getpid(), signal.SIGKILL)


def log_path(log_dir: Path, rank: int) -> Path:
    """Where the output of a rank other than 0 goes."""
    return log_dir / f"rank{rank}.log"


def _write_error_file(end: _RankEnd, path: str) -> bool:
    """In the form that torchrun's agent reads and prints, with our own account beside it. Returns whether it is there.

    Whole or not at all, for the full disk that ends a run may be the one that takes this file: half of one would be
    what the agent fails on.
    """
    if not path:
        return False
    extra = {"py_callstack": end.traceback or end.summary, "timestamp": str(int(time.time()))}
    content = json.dumps({"message": {"message": end.summary, "extraInfo": extra}, "megatron_lite": asdict(end)})
    partial = Path(f"{path}.partial")
    try:
        partial.write_text(content)
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        return False
    return True


def _how_it_ended(exit_code: int) -> str:
    if exit_code >= 0:
        return f"the process ended with exit status {exit_code}"
    name = signal.Signals(-exit_code).name
    hint = " (the system may be out of memory)" if name == "SIGKILL" else ""
    return f"the process was killed by {name}{hint}"


def _describe(end: _RankEnd, world_size: int, logs: Path | None) -> str:
    """What to tell the user of the rank that ended the run; empty if it chose its exit code itself."""
    if end.is_user_error:
        return f"error: {end.summary}"
    if not end.summary:
        return ""
    lines = [f"rank {end.rank} of {world_size} failed: {end.summary}" if world_size > 1 else f"error: {end.summary}"]
    if end.traceback:
        lines.append(end.traceback.rstrip())
    elif logs is not None and log_path(logs, end.rank).exists():
        lines += log_path(logs, end.rank).read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    return "\n".join(lines)
