"""The roll of the ranks, over a store in memory: threads stand for ranks."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from megatron_lite.distributed import roll_call
from megatron_lite.distributed.environments import Place
from megatron_lite.distributed.faults import LostPeer, in_words, innermost, lost_in
from megatron_lite.distributed.roll_call import RollCall
from megatron_lite.utils.memory import peak_memory_bytes

LOST = "[/gloo/transport/tcp/pair.cc:528] Connection closed by peer [127.0.0.1]:1234"


def rank_that(rank: int, world_size: int, store: dist.Store, ends: str, seen: dict[int, LostPeer]) -> threading.Thread:
    """ends: with "lost" the rank loses a peer, with "stuck" it waits until somebody has lost one; then it leaves."""

    def live() -> None:
        place = Place(rank=rank, world_size=world_size, host="h1", port=7)
        try:
            with RollCall(place, store, store):
                if ends == "lost":
                    raise LostPeer("waited 2.0 s, since 12:00:00, in all-reduce (sum) over dp with ranks 0, 1, 2")
                if ends == "stuck":
                    store.wait([f"roll/here/{rank}"], timedelta(seconds=30))
                    time.sleep(0.2)
        except LostPeer as error:
            seen[rank] = error

    thread = threading.Thread(target=live)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("ends", "speaker", "says"),
    [
        (
            ["lost", "stuck", None],
            0,
            "rank 2 does not answer: dead, stopped or cut off; found when rank 0 waited 2.0 s",
        ),
        (
            [None, "stuck", "lost"],
            1,
            "rank 0 does not answer: dead, stopped or cut off; found when rank 2 waited 2.0 s",
        ),
        ([None, None, "lost"], 2, "ranks 0, 1 do not answer: dead, stopped or cut off; found when rank 2 waited"),
        (
            ["stuck", "stuck", "lost"],
            0,
            "every rank answers, and yet rank 2 waited 2.0 s, since 12:00:00, in all-reduce",
        ),
    ],
)
def test_the_lowest_rank_that_answers_says_who_is_missing(
    ends: list[str | None], speaker: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(roll_call, "ANSWER_S", 2.0)
    store, seen = dist.HashStore(), dict[int, LostPeer]()
    threads = [rank_that(rank, len(ends), store, end, seen) for rank, end in enumerate(ends) if end is not None]
    for thread in threads:
        thread.join(timeout=60)
    said = capsys.readouterr().err
    assert said.startswith(says) and said.count("\n") == 1
    caller = ends.index("lost")
    assert seen[caller].told == said.strip() and seen[caller].told_by == speaker


class Gone:
    """A store whose server has ended."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("Connection reset by peer")


def test_without_a_store_the_rank_itself_says_what_it_knows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(roll_call, "ANSWER_S", 0.1)
    with pytest.raises(LostPeer) as caught, RollCall(Place(1, 2, host="h1", port=7), Gone(), Gone()):
        raise LostPeer("waited 2.0 s, since 12:00:00, in a barrier")
    said = capsys.readouterr().err
    assert said.startswith("rank 1 waited 2.0 s") and "; rank 0, at h1:7, does not answer either" in said
    assert said.count("\n") == 1 and caught.value.told == said.strip()


@pytest.mark.parametrize("is_served", [True, False])
def test_a_rank_whose_agent_is_gone_stops_in_order(is_served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = list[tuple[int, int]]()
    monkeypatch.setattr(roll_call.os, "kill", lambda pid, number: killed.append((pid, number)))
    with RollCall(Place(1, 2, store_is_served=is_served), Gone(), Gone()) as call:
        call._thread.join(timeout=30)
    assert killed == ([(os.getpid(), signal.SIGTERM)] if is_served else [])


def test_ranks_that_leave_in_order_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    store = dist.HashStore()
    threads = [rank_that(rank, 3, store, "done", {}) for rank in range(3)]
    for thread in threads:
        thread.join(timeout=30)
    assert capsys.readouterr().err == ""


def test_an_error_of_a_collective_says_what_was_waited_for() -> None:
    error = lost_in(RuntimeError(LOST), "reduce-scatter", range(0, 8, 2), "dp", time.time() - 3)
    assert isinstance(error, LostPeer)
    assert str(error).startswith("waited 3.0 s, since ")
    assert "in reduce-scatter over dp with ranks 0, 2, 4, 6: Connection closed by peer" in str(error)
    mine = RuntimeError("shapes do not match")
    assert lost_in(mine, "reduce-scatter", range(2), "dp", 0.0) is mine, "a bug here is no loss"
    assert lost_in(error, "barrier", range(2), "dp", 0.0) is error, "what is said already stays"


def test_many_ranks_are_not_all_listed() -> None:
    assert (in_words([3]), in_words([0, 2])) == ("rank 3", "ranks 0, 2")
    assert in_words(range(100)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 92 more"


def test_the_place_of_an_error_is_ours_and_not_that_of_the_messenger() -> None:
    try:
        peak_memory_bytes(None)  # type: ignore[arg-type]
    except AttributeError as error:
        assert innermost(traceback.extract_tb(error.__traceback__)) == "utils/memory.py:peak_memory_bytes"
    assert innermost([]) == ""
