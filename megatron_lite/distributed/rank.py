"""One rank from the call of its function to its exit code: what is said of how it ended, where, and by whom."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_lite.distributed.environments import ATTEMPT_VARIABLE, Place, find_place, own_rank
from megatron_lite.distributed.faults import LostPeer, is_user_error, lost_a_peer

# 75 is EX_TEMPFAIL of sysexits.h: stopped by a signal that asks for it, and to be started again.
EXIT_FAILURE, EXIT_USER_ERROR, EXIT_REQUEUE = 1, 2, 75
# A rank that lost a peer waits this long before it ends, so that the launcher sees first the one that went first; and
# so does one that leaves it to rank 0 to say what all have, so that rank 0 is not ended before it has.
PATIENCE_S = 5.0
LOG_TAIL_LINES = 30
PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
SIGNAL_HINTS = {
    "SIGKILL": " (the system may be out of memory)",
    "SIGBUS": " (a file that it reads was cut off, or the disk under it fails: data, or offload.dir)",
}


@dataclass(frozen=True)
class RankEnd:
    """How a rank ended. No summary: it returned a nonzero exit code by itself. No traceback: it died, or all is said.

    is_told: rank 0, which has the terminal, has said it. is_said: where each has a terminal, some rank has, or the
    agent of another machine sees to it.
    """

    rank: int
    exit_code: int
    is_user_error: bool
    summary: str
    traceback: str
    is_told: bool = False
    is_said: bool = False


def exit_code_of(number: int) -> int:
    """What a process ends with that a signal has stopped in order: schedulers ask by SIGTERM and SIGUSR1, and are to
    start it again; of the others it is 128 and the number, as shells have it."""
    return EXIT_REQUEUE if number in (signal.SIGTERM, signal.SIGUSR1) else 128 + number


def run_rank(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
) -> int:
    """Call `function` as one rank (or as the only process) and return the exit code of this process.

    The code is what the function returns if that is an int, else 0; 2 for a user's error; 1 for any other. An error
    goes to the file that torchrun's agent reads (TORCHELASTIC_ERROR_FILE), if any, and to stderr: from rank 0 alone if
    every rank has it, so that it is said once, and the others wait for the launcher to end them; under torchrun else
    from local rank 0, for the agent speaks of others; and from no rank under `launch_local`, which says it itself. A
    rank that only lost a peer says in one line what it waited for, if it knows, and waits for the launcher to end it,
    so as not to pose as the cause.
    """
    environ = os.environ if environ is None else environ
    if ATTEMPT_VARIABLE in environ:
        _end_with_agent()
    try:
        place, is_agreed, is_said = find_place(environ), False, False
    except ValueError as error:  # the function finds the same; and so does every rank, if it is of the whole world
        given = environ.get("LOCAL_RANK", "")
        place = Place(rank=own_rank(environ), local_rank=int(given) if given.isdecimal() else 0)
        is_agreed, is_said = getattr(error, "is_agreed", False), False
    try:
        result = function(*args, **(kwargs or {}))
    except Exception as error:
        is_agreed = is_agreed or getattr(error, "is_agreed", False)
        is_said = isinstance(error, LostPeer) and bool(error.told)
        if place.world_size > 1 and lost_a_peer(str(error)):
            if isinstance(error, LostPeer) and not is_said:
                print(f"rank {place.rank}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
            time.sleep(PATIENCE_S)
        end = _end_of(error, place)
    else:
        code = result if isinstance(result, int) else 0
        end = RankEnd(rank=place.rank, exit_code=code, is_user_error=False, summary="", traceback="")
    if end.exit_code:
        error_file = environ.get("TORCHELASTIC_ERROR_FILE", "")
        speaks = _speaks(place, is_agreed=is_agreed, agent_knows=bool(error_file))
        is_said_elsewhere = is_agreed and place.rank != place.local_rank
        is_written = write_error_file(replace(end, is_said=is_said or is_said_elsewhere or speaks), error_file)
        message = describe(end, place.world_size, None)
        if message and not is_said and _speaks(place, is_agreed=is_agreed, agent_knows=is_written):
            print(message, file=sys.stderr, flush=True)
        if is_agreed and place.rank > 0 and place.launcher != "--nproc":
            _wait_for_end()
    return end.exit_code


def _wait_for_end() -> None:
    """Until the launcher ends this rank by SIGTERM, `PATIENCE_S` at most. Its exit code is its own all the same."""
    is_asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: is_asked.set())
    try:
        is_asked.wait(PATIENCE_S)
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _end_with_agent() -> None:
    """Has Linux send this process SIGTERM when its agent (`agent.main`) is gone, killed for example: it would run on by
    itself, and keep its GPU."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _end_of(error: Exception, place: Place) -> RankEnd:
    if isinstance(error, LostPeer) and error.told:
        is_told = error.told_by == 0
        return RankEnd(place.rank, EXIT_FAILURE, False, summary=error.told, traceback="", is_told=is_told)
    is_user = is_user_error(error)
    return RankEnd(
        rank=place.rank,
        exit_code=EXIT_USER_ERROR if is_user else EXIT_FAILURE,
        is_user_error=is_user,
        summary=str(error) if is_user else f"{type(error).__name__}: {error}",
        traceback="" if is_user else traceback.format_exc(),
    )


def _speaks(place: Place, *, is_agreed: bool, agent_knows: bool) -> bool:
    if place.launcher == "--nproc" and agent_knows:
        return False
    if is_agreed:
        return place.rank == 0
    return place.local_rank == 0 or not agent_knows


def log_path(log_dir: Path, rank: int) -> Path:
    """Where the output of a rank other than 0 goes."""
    return log_dir / f"rank{rank}.log"


def write_error_file(end: RankEnd, path: str) -> bool:
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


def read_error_files(folder: Path) -> list[RankEnd]:
    """How the ranks ended that left such a file somewhere in the folder, the first one first."""
    found = []
    for path in sorted(folder.rglob("*.json"), key=lambda path: path.stat().st_mtime_ns):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found.append(RankEnd(**json.loads(path.read_text())["megatron_lite"]))
    return found


def end_of_failure(rank: int, failure: Any) -> RankEnd:
    """From what torch's agent knows of a rank that failed (`ProcessFailure`)."""
    report = failure.error_file_data.get("megatron_lite")
    if report is not None:
        return RankEnd(**report)
    code = failure.exitcode
    return RankEnd(rank, code, is_user_error=False, summary=how_it_ended(code), traceback="")


def how_it_ended(exit_code: int) -> str:
    if exit_code >= 0:
        return f"the process ended with exit status {exit_code}"
    name = signal.Signals(-exit_code).name
    return f"the process was killed by {name}{SIGNAL_HINTS.get(name, '')}"


def describe(end: RankEnd, world_size: int | None, logs: Path | None) -> str:
    """What to tell the user of the rank that ended the run; empty if it chose its exit code itself. world_size: None
    where it is not known."""
    if end.is_user_error:
        return f"error: {end.summary}"
    if not end.summary or end.is_told:
        return ""
    who = "error" if world_size == 1 else f"rank {end.rank}{f' of {world_size}' if world_size else ''} failed"
    lines = [f"{who}: {end.summary}"]
    if end.traceback:
        lines.append(end.traceback.rstrip())
    elif logs is not None and log_path(logs, end.rank).exists():
        lines += log_path(logs, end.rank).read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    return "\n".join(lines)
