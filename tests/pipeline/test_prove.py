"""The prover accepts every schedule that is shipped, and counts what it holds."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.config.schedules import SCHEDULE_RULES
from megatron_lite.pipeline import orders
from megatron_lite.pipeline.communication import with_communication
from megatron_lite.pipeline.instructions import (
    RECEIVES,
    Instruction,
    Kind,
    Placement,
    Schedule,
    ScheduleError,
    loop,
    vee,
)
from megatron_lite.pipeline.prove import prove, prove_world
from megatron_lite.pipeline.prove_programs import Semantics
from megatron_lite.pipeline.schedules import SCHEDULES, forward_only, make_schedule

PP = (1, 2, 3, 4, 8)
MICROBATCHES = (*range(1, 10), 16, 24)


def sizes(name: str) -> list[tuple[int, int, int]]:
    """(pp, virtual stages, microbatches) that a schedule takes."""
    rule = SCHEDULE_RULES[name]
    fewest, most = rule.virtual_stages
    return [(pp, v, m) for pp in PP for v in range(fewest, min(most or 3, 3) + 1) for m in MICROBATCHES]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_shipped_schedule_is_proven(name: str) -> None:
    assert len(sizes(name)) > 20
    for pp, v, m in sizes(name):
        proof = prove(make_schedule(name, pp, v, m), dp=2 if pp < 4 else 1, tp=2 if pp < 4 else 1, tied=pp > 1)
        assert len(proof.peak_activations) == pp
        assert all(1 <= peak <= m * v for peak in proof.peak_activations), (pp, v, m)


@pytest.mark.parametrize("pp", PP)
@pytest.mark.parametrize("m", MICROBATCHES)
def test_peaks_are_those_of_the_papers(pp: int, m: int) -> None:
    """1F1B: stage i of p holds min(p - i, m) microbatches (arXiv:1806.03377); GPipe holds all (arXiv:1811.06965)."""
    assert prove(make_schedule("1f1b", pp, 1, m)).peak_activations == tuple(min(pp - rank, m) for rank in range(pp))
    assert prove(make_schedule("gpipe", pp, 1, m)).peak_activations == (m,) * pp


def test_halves_hold_until_the_weights_have_their_gradient() -> None:
    placement = loop(1)
    late = [Instruction(Kind.FORWARD, 0, 0), Instruction(Kind.BACKWARD_INPUT, 0, 0), Instruction(Kind.FORWARD, 0, 1)]
    late += [Instruction(Kind.BACKWARD_INPUT, 0, 1), *(Instruction(Kind.BACKWARD_WEIGHT, 0, m) for m in range(2))]
    schedule = Schedule("late weights", placement, 2, with_communication([late], placement))
    assert prove(schedule).peak_activations == (2,)


@pytest.mark.parametrize("placement", [loop(1), loop(4), loop(3, 2), vee(1), vee(3)])
def test_chunks_on_one_rank_and_evaluation(placement: Placement) -> None:
    """Chunks that follow each other on one rank need no message; an evaluation holds nothing and reduces nothing."""
    for m in (1, 2, 5):
        lists = with_communication(orders.breadth_first(placement, m), placement)
        assert prove(Schedule("gpipe", placement, m, lists), tied=True, tp=2).peak_activations == (
            (placement.num_chunks // placement.num_ranks * m,) * placement.num_ranks
        )
        proof = prove(forward_only(placement, m), dp=2, tp=2, trains=False)
        assert proof.peak_activations == (0,) * placement.num_ranks
    with pytest.raises(ScheduleError, match=r'^rank 0: "backward of chunk 0, microbatch 0" is missing$'):
        prove(forward_only(placement, 1))
    with pytest.raises(ScheduleError, match="has no place in this schedule"):
        prove(Schedule("gpipe", placement, 5, lists), trains=False)
    assert prove(forward_only(placement, 0), trains=False).num_instructions == 0


def posted_ahead(schedule: Schedule) -> Schedule:
    """Every receive moved to just behind the one before it of its kind: while one tensor is used, the next comes."""
    lists = []
    for instructions in schedule.lists:
        changed = [one for one in instructions if one.kind not in RECEIVES]
        for kind in RECEIVES:
            receives = [one for one in instructions if one.kind is kind]
            user = Kind.FORWARD if kind is Kind.RECEIVE_ACTIVATION else Kind.BACKWARD
            for receive, before in zip(receives, [None, *receives], strict=False):
                place = 0 if before is None else changed.index(before._replace(kind=user))
                changed.insert(place, receive)
        lists.append(tuple(changed))
    return Schedule(schedule.name, schedule.placement, schedule.num_microbatches, tuple(lists))


def test_receives_that_are_posted_ahead_stop_1f1b() -> None:
    """Negative control, and the reason why receives stand where communication.py puts them."""
    for semantics in Semantics:
        if semantics is Semantics.BUFFERED:
            continue
        with pytest.raises(ScheduleError, match="wait for each other"):
            prove_world([[posted_ahead(make_schedule("1f1b", 4, 1, 5))]], [semantics])
    prove_world([[posted_ahead(make_schedule("1f1b", 2, 1, 5))]], [Semantics.TWO_STREAMS])


def is_proven(replicas: list[list[Schedule]]) -> bool:
    try:
        prove_world(replicas, [Semantics.RENDEZVOUS], tied=True)
    except ScheduleError:
        return False
    return True


@pytest.mark.parametrize("seed", range(3))
def test_more_replicas_do_not_change_the_verdict(seed: int) -> None:
    """Why two replicas along an axis are enough."""
    draw = random.Random(seed)
    verdicts = {True: 0, False: 0}
    for _ in range(60):
        pp, m = draw.randint(1, 3), draw.randint(1, 3)
        schedule = make_schedule("1f1b", pp, 1, m)
        lists = [list(one) for one in schedule.lists]
        for _ in range(draw.randint(0, 2)):
            changed = draw.choice(lists)
            i = draw.randrange(len(changed) - 1)
            changed[i], changed[i + 1] = changed[i + 1], changed[i]
        schedule = Schedule("changed", schedule.placement, m, tuple(tuple(one) for one in lists))
        verdict = is_proven([[schedule]])
        verdicts[verdict] += 1
        for dp, tp in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3), (3, 3)):
            assert is_proven([[schedule] * tp] * dp) == verdict
    assert min(verdicts.values()) > 5


def test_replicas_with_lists_of_their_own() -> None:
    """They end together as long as the ranks of a group reduce at the same point of their lists."""
    one, other = make_schedule("1f1b", 2, 1, 4), make_schedule("gpipe", 2, 1, 4)
    prove_world([[one], [other]], tuple(Semantics), tied=True)
    with pytest.raises(ScheduleError, match=r"^collective 2 over tp is .* on rank 0 \(dp 0, tp 0\), .* tp 1\)$"):
        prove_world([[one, other]], tuple(Semantics))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_shipped_schedule_of_any_size_is_proven(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(SCHEDULES)))
    fewest, most = SCHEDULE_RULES[name].virtual_stages
    pp, m = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 40))
    chunks = data.draw(st.integers(fewest, min(most or 4, 4)))
    proof = prove(make_schedule(name, pp, chunks, m), dp=data.draw(st.integers(1, 2)), tied=data.draw(st.booleans()))
    assert proof.num_microbatches == m and all(proof.peak_activations)
