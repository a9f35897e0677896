"""Who is still there, when a rank has waited for others in vain: one line, from the lowest rank that answers.

A rank whose collective fails knows what it waited for, and not who is to blame: gloo names the neighbour that closed
its connection, and of one that stands still nothing at all. So a thread of every rank waits at the store for the roll
to be called, and answers whatever the main thread is stuck in. Who does not answer is dead, stopped, or cut off. The
lowest rank that answers looks at all answers, and the others at what it says: the store is one, and ranks are many.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from datetime import timedelta
from typing import Protocol

from megatron_lite.distributed.environments import Place
from megatron_lite.distributed.faults import LostPeer, in_words, innermost, place_of
from megatron_lite.distributed.rank import EXIT_FAILURE

# How long a rank may take to answer, and how long after the line is said a rank that is still stuck is ended.
ANSWER_S = 5.0
LAST_WORDS_S = 15.0
FOREVER = timedelta(days=3650)


class Store(Protocol):
    """What is used of `torch.distributed.Store`."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def compare_set(self, key: str, expected: str, desired: str) -> bytes: ...
    def wait(self, keys: list[str], timeout: timedelta) -> None: ...


class RollCall:
    """This rank's part in it, for the length of a `with` block: a LostPeer that ends the block calls the roll.

    store: the one that the ranks share. listening: another connection to it, for one that waits serves nobody else.
    """

    def __init__(self, place: Place, store: Store, listening: Store) -> None:
        self._place, self._store = place, store
        self._is_over, self._done = False, threading.Event()
        self._told, self._told_by = "", place.rank
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._listen, args=(listening,), name="roll call", daemon=True)

    def __enter__(self) -> RollCall:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, LostPeer):
            self._call(error)
            self._is_over = True
            return
        # From here on this rank does not answer, and peers that leave are nothing to speak of.
        self._is_over = True
        with contextlib.suppress(RuntimeError):  # the store may be gone, and the thread with it
            self._store.set(self._key("wake", self._place.rank), "over")
            self._thread.join(ANSWER_S)

    def _call(self, error: LostPeer) -> None:
        """Returns when a rank has said who is missing; where the store cannot be reached, this rank says that."""
        threading.Thread(target=self._wake_all, args=(self._account(error),), daemon=True).start()
        if not self._done.wait(3 * ANSWER_S):
            server = "the launcher's agent" if self._place.store_is_served else "rank 0"
            self._told = (
                f"{self._account(error)}; {server}, at {self._place.address}, does not answer either, so nobody can "
                "tell who else is missing"
            )
            # One voice of a host is enough; on that of rank 0, which may be what is gone, it is rank 1.
            if self._place.local_rank == 0 or self._place.rank == 1:
                _say(self._told)
        error.told, error.told_by = self._told, self._told_by

    def _account(self, error: LostPeer) -> str:
        place = place_of(error)
        return f"rank {self._place.rank} {str(error).splitlines()[0]}" + (f" (in {place})" if place else "")

    def _wake_all(self, account: str) -> None:
        with contextlib.suppress(RuntimeError):
            self._store.compare_set("roll/account", "", account)
            for rank in range(self._place.world_size):
                self._store.set(self._key("wake", rank), "roll")

    def _listen(self, store: Store) -> None:
        try:
            store.wait([self._key("wake", self._place.rank)], FOREVER)
        except RuntimeError:
            if self._place.store_is_served and not self._is_over:
                # The agent that started this process is gone, and it shall not run on by itself.
                os.kill(os.getpid(), signal.SIGTERM)
            return
        if self._is_over:
            return
        try:
            frame = sys._current_frames().get(self._main)
            store.set(self._key("here", self._place.rank), innermost(traceback.extract_stack(frame)))
            deadline = time.monotonic() + ANSWER_S
            self._told_by = self._lowest_present(store, deadline)
            if self._told_by == self._place.rank:
                self._told = self._judge(self._answers(store, deadline), store.get("roll/account").decode())
                store.set("roll/verdict", self._told)
            else:
                store.wait(["roll/verdict"], timedelta(seconds=ANSWER_S))
                self._told = store.get("roll/verdict").decode()
        except RuntimeError:
            return  # whoever calls says that the store is gone
        if self._place.rank == self._told_by:
            _say(self._told)
        self._done.set()
        # The collective that the main thread may still be in cannot end: of what it has no other ranks will hear.
        time.sleep(LAST_WORDS_S)
        if not self._is_over:
            os._exit(EXIT_FAILURE)

    def _lowest_present(self, store: Store, deadline: float) -> int:
        """The lowest rank that has answered when all have had the time to; at once if that is the first."""
        while not store.check([self._key("here", 0)]) and time.monotonic() < deadline:
            time.sleep(0.1)
        return next(rank for rank in range(self._place.world_size) if store.check([self._key("here", rank)]))

    def _answers(self, store: Store, deadline: float) -> dict[int, str]:
        """Where each rank is that answers in time; all are asked once, however late it is."""
        missing, present = set(range(self._place.world_size)), dict[int, str]()
        while missing:
            for rank in sorted(missing):
                if store.check([self._key("here", rank)]):
                    present[rank] = store.get(self._key("here", rank)).decode()
            missing -= set(present)
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return present

    def _judge(self, present: dict[int, str], account: str) -> str:
        missing = [rank for rank in range(self._place.world_size) if rank not in present]
        if missing:
            plural = len(missing) > 1
            return (
                f"{in_words(missing)} {'do' if plural else 'does'} not answer: dead, stopped or cut off; found when "
                f"{account}"
            )
        where = "; ".join(f"rank {rank} is in {present[rank] or 'no code of ours'}" for rank in sorted(present)[:8])
        return (
            f"every rank answers, and yet {account}; {where}; raise train.collective_timeout_s if it may take so long"
        )

    def _key(self, what: str, rank: int) -> str:
        return f"roll/{what}/{rank}"


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)
