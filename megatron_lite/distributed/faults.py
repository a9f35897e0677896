"""Tell errors apart: the user's from ours, and the first rank's from those of the ranks it took along."""

from __future__ import annotations

import sysconfig
import traceback

# How an error reads, on gloo, NCCL and the store, when it was the end of another rank that caused it.
LOST_PEER_SIGNS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "failed to recv, got 0 bytes",
    "remote process exited",
)


class LostPeer(RuntimeError):
    """Another rank has ended, or does not answer. The message says who waited for what from whom."""


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
