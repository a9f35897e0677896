"""Tell errors apart: the user's from ours, and the first rank's from those of the ranks it took along."""

from __future__ import annotations

import re
import sysconfig
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
MOST_SHOWN = 8

# How an error reads, on gloo, NCCL and the store, when the end of another rank, or its standstill, has caused it.
LOST_PEER_SIGNS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "failed to recv, got 0 bytes",
    "remote process exited",
    "ms for recv operation",
    "ms for send operation",
    "timeout caused pair closure",  # of another wait, on the same connection of gloo
)


class LostPeer(RuntimeError):
    """Another rank has ended, or does not answer. The message says what this one waited for, with whom, since when.

    told: the line that a rank has said of it, with who is missing, once one has (`roll_call`); told_by: that rank.
    """

    told = ""
    told_by = 0


def lost_in(error: RuntimeError, what: str, ranks: Sequence[int], axis: str, began: float) -> RuntimeError:
    """What to raise for an error that came out of a collective: LostPeer where another rank caused it, else the same.

    ranks: the others on the axis. began: when the wait did, `time.time`.
    """
    if isinstance(error, LostPeer) or not lost_a_peer(str(error)):
        return error
    since = time.strftime("%H:%M:%S", time.localtime(began))
    # Without the line of gloo's sources that it begins with.
    reason = re.sub(r"^\[[^\]]*\]\s*", "", str(error).strip().splitlines()[0])
    return LostPeer(
        f"waited {time.time() - began:.1f} s, since {since}, in {what} over {axis} with {in_words(ranks)}: {reason}"
    )


def in_words(ranks: Sequence[int]) -> str:
    """``rank 3``; ``ranks 0, 2, 4``; of many the first ones."""
    more = f" and {len(ranks) - MOST_SHOWN} more" if len(ranks) > MOST_SHOWN else ""
    return f"rank{'' if len(ranks) == 1 else 's'} {', '.join(map(str, ranks[:MOST_SHOWN]))}{more}"


def place_of(error: BaseException) -> str:
    """``file.py:function`` of the code that had the error, below the rooms that only carry messages."""
    return innermost(traceback.extract_tb(error.__traceback__))


def innermost(stack: Iterable[traceback.FrameSummary]) -> str:
    """``zero/reduce.py:wait``: the last place of a stack in this package, outside distributed/; empty if in none."""
    places = [
        f"{path.relative_to(PACKAGE).as_posix()}:{frame.name}"
        for frame in stack
        if (path := Path(frame.filename)).is_relative_to(PACKAGE) and path.parent.name != "distributed"
    ]
    return places[-1] if places else ""


def is_user_error(error: BaseException) -> bool:
    """Whether the message alone is what the user needs: an OSError, or a ValueError that is not a library's own.

    A ValueError from the depths of torch or of the standard library is a bug here, and its traceback must be seen.
    """
    if isinstance(error, ValueError) and error.__traceback__ is not None:
        frame = list(traceback.walk_tb(error.__traceback__))[-1][0]
        package = frame.f_globals.get("__name__", "").split(".")[0]
        libraries = tuple(sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib"))
        return package == __name__.split(".")[0] or not frame.f_code.co_filename.startswith(libraries)
    return isinstance(error, (ValueError, OSError))


def lost_a_peer(message: str) -> bool:
    """Whether an error's message reads like one that another rank's end has caused."""
    return any(sign in message for sign in LOST_PEER_SIGNS)
