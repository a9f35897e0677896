"""What ranks say to one another first, over a store in memory: threads stand for ranks."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from megatron_lite.distributed import meeting
from megatron_lite.distributed.environments import Place
from megatron_lite.distributed.meeting import Facts, MeetingError, Met, facts_of, meet

VERSIONS = {"megatron_lite": "1.0", "torch": "2.13", "Python": "3.11"}
FACTS = Facts(host="h1", machine="h1", versions=VERSIONS)
SETTINGS = {"train.seed": 1, "optim.lr": 0.1, "model.family": "llama"}


def gathered(
    facts: list[Facts],
    settings: list[dict[str, Any]] | None = None,
    *,
    missing: int | None = None,
    world_size: int | None = None,
) -> list[Met | str]:
    """What each rank that comes hears: what all know, or the message of the error.
    world_size: what the last one means."""
    store, heard = dist.HashStore(), dict[int, Met | str]()
    settings = settings or [SETTINGS] * len(facts)

    def come(rank: int) -> None:
        size = world_size if world_size is not None and rank == len(facts) - 1 else len(facts)
        place = Place(rank=rank, world_size=size, launcher="srun", host="h1", port=7)
        one = dataclasses.replace(facts[rank], digest=str(settings[rank]), world_size=size)
        try:
            heard[rank] = meet(store, place, one, settings[rank], 0.5 if missing is not None else 30)
        except ValueError as error:  # of which MeetingError is one
            heard[rank] = str(error)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(len(facts)) if rank != missing]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return [heard[rank] for rank in sorted(heard)]


def test_ranks_that_agree_know_how_many_hosts_they_are_on_and_which_attempt_it_is() -> None:
    other = dataclasses.replace(FACTS, host="h2", machine="h2", attempt=3)
    assert gathered([FACTS, FACTS, other, other]) == [Met(num_hosts=2, attempt=3, world_size=4)] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cuda"}, "rank 0 computes on cpu and rank 2 on cuda; start the ranks on hosts that have a GPU"),
        (
            {"versions": VERSIONS | {"torch": "2.11"}},
            "rank 2 on h1 differs from rank 0 on h1 in torch (2.11, not",
        ),
        ({"problem": "no interface ib7"}, "rank 2 on h1: no interface ib7"),
        ({"machine": "h9", "loopback": "127.0.1.1"}, "the name of host h9 (rank 2) leads to 127.0.1.1, where no other"),
    ],
)
def test_what_one_rank_has_every_rank_hears(changes: dict[str, Any], message: str) -> None:
    heard = gathered([FACTS, FACTS, dataclasses.replace(FACTS, **changes)])
    assert len(set(heard)) == 1 and len(heard) == 3
    assert str(heard[0]).startswith(message) and "\n" not in str(heard[0])


def test_ranks_that_mean_other_worlds_hear_of_it() -> None:
    said = "rank 1 on h1 means a world of 3 ranks, and rank 0 one of 2; start all ranks with the same WORLD_SIZE"
    heard = gathered([FACTS] * 2, world_size=3)
    assert len(heard) == 2 and all(str(one).startswith(said) for one in heard)


def test_a_rank_of_which_the_first_does_not_know_is_refused() -> None:
    """It would wait for a world that nobody makes."""
    store = dist.HashStore()
    store.set("met", json.dumps(dataclasses.asdict(Met(1, 0, 2))))
    with pytest.raises(ValueError, match="rank 2 on h1 means a world of 3 ranks, and rank 0 one of 2") as error:
        third = dataclasses.replace(FACTS, world_size=3)
        meet(store, Place(rank=2, world_size=3, launcher="srun", host="h1", port=7), third, SETTINGS, 1)
    assert not isinstance(error.value, MeetingError), "it speaks for itself"


def test_a_rank_with_another_config_is_named_with_the_keys() -> None:
    other = SETTINGS | {"optim.lr": 0.2, "train.extra": None}
    heard = gathered([FACTS] * 4, [SETTINGS, SETTINGS, other, other])
    assert (
        heard
        == [
            "rank 2 on h1 differs from rank 0 on h1 in optim.lr (0.2, not 0.1), and rank 3 too; start every rank "
            "from the same files, with the same arguments"
        ]
        * 4
    )


def test_a_problem_that_every_rank_has_is_said_as_it_is() -> None:
    assert gathered([dataclasses.replace(FACTS, problem="a typo")] * 3) == ["a typo"] * 3


def test_a_rank_that_does_not_come_is_named() -> None:
    heard = gathered([FACTS] * 3, missing=1)
    assert len(heard) == 2 and heard[0] == heard[1]
    assert str(heard[0]).startswith("rank 0 of 3 waited 0.5 s at h1:7 for rank 1; look at what they say")


def test_two_ranks_with_one_gpu() -> None:
    ranks = [dataclasses.replace(FACTS, device="cuda", own_device=name) for name in ("a", "b", "a")]
    assert all(str(one).startswith("ranks 0 and 2 on h1 have the same GPU, a; ") for one in gathered(ranks))
    elsewhere = dataclasses.replace(ranks[2], machine="h2", host="h2")
    assert gathered([*ranks[:2], elsewhere]) == [Met(2, 0, 3)] * 3


def test_one_host_may_have_a_name_that_leads_back() -> None:
    assert gathered([dataclasses.replace(FACTS, loopback="127.0.1.1")] * 2) == [Met(1, 0, 2)] * 2


def test_facts_change_with_the_settings_and_not_with_their_order() -> None:
    def digest(settings: dict[str, Any]) -> str:
        return facts_of(Place(), device="cpu", own_device="", settings=settings, problem="").digest

    assert digest(SETTINGS) == digest(dict(reversed(SETTINGS.items())))
    assert digest(SETTINGS) != digest(SETTINGS | {"train.seed": 2})


def test_the_first_rank_stays_until_all_have_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may serve the store."""
    store, order = dist.HashStore(), list[int]()
    monkeypatch.setattr(meeting, "PATIENCE_S", 20.0)

    def leave(rank: int) -> None:
        if rank:
            time.sleep(0.3)
        meeting._leave_together(store, Place(rank=rank, world_size=2))
        order.append(rank)

    threads = [threading.Thread(target=leave, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert order[-1] == 0
