"""The simulator against formulas, hand-made examples and a second, slower computation; idle time by cause; memory."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest

from megatron_lite.pipeline.communication import with_communication
from megatron_lite.pipeline.idle import Cause, Facts, Idle, facts_of, idle_times
from megatron_lite.pipeline.instructions import RECEIVES, SENDS, Instruction, Kind, Schedule, ScheduleError, loop
from megatron_lite.pipeline.schedules import make_schedule
from megatron_lite.pipeline.simulate import Costs, Links, simulate
from megatron_lite.pipeline.timeline import Span, Timeline, activations_alive

F, B, BI, BW = Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT
NAMES = ("1f1b", "gpipe")


def facts(schedule: Schedule, costs: Costs | None = None, links: Links | None = None) -> Facts:
    return facts_of(simulate(schedule, costs or Costs.unit(), links))


def split_backward(num_ranks: int, num_microbatches: int) -> Schedule:
    """All forwards, then each backward's halves, the weights' one microbatch behind."""
    orders = []
    for rank in range(num_ranks):
        order = [Instruction(F, rank, m) for m in range(num_microbatches)]
        for m in range(num_microbatches):
            order += [Instruction(BI, rank, m), *([Instruction(BW, rank, m - 1)] if m else [])]
        orders.append([*order, Instruction(BW, rank, num_microbatches - 1)])
    placement = loop(num_ranks)
    return Schedule("halves", placement, num_microbatches, with_communication(orders, placement))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("num_microbatches", [1, 2, 5, 8, 32])
def test_the_bubble_is_exactly_that_of_the_formula(name: str, num_ranks: int, num_microbatches: int) -> None:
    """(p - 1) / m of the ideal time (Narayanan et al. 2021, section 2.2), whatever a forward and a backward cost."""
    schedule = make_schedule(name, num_ranks, 1, num_microbatches)
    wanted = Fraction(num_ranks - 1, num_microbatches)
    for costs in (Costs.unit(), Costs({F: Fraction(1, 3), B: Fraction(5, 7)})):
        found = facts(schedule, costs)
        assert found.bubble_ratio == wanted
        assert found.bubble_share == wanted / (1 + wanted), "the same over the makespan"
        assert found.idle_by_cause[Cause.RAMP] == sum(found.idle_by_cause.values())
    # Negative controls: a message that takes time, and one rank more, are seen.
    if num_ranks > 1:
        assert facts(schedule, links=Links(latency_s=1)).bubble_ratio > wanted
        assert facts(make_schedule(name, num_ranks + 1, 1, num_microbatches)).bubble_ratio > wanted


def test_messages_share_a_link_and_arrive_late() -> None:
    """By hand: a message keeps its link for 4 bytes / 2 bytes per second, and is there one second after that."""
    timeline = simulate(make_schedule("gpipe", 2, 1, 2), Costs.unit(), Links(1, 2, 4))
    computed = [
        [(span.instruction.kind, span.began, span.end) for span in rank if span.instruction.kind in (F, B)]
        for rank in timeline.ranks
    ]
    assert computed == [
        [(F, 0, 1), (F, 1, 2), (B, 12, 14), (B, 14, 16)],
        [(F, 4, 5), (F, 6, 7), (B, 7, 9), (B, 9, 11)],  # the second message leaves at 3, behind the first
    ]
    assert timeline.makespan == 16
    assert [(idle.start, idle.end, idle.cause) for idle in idle_times(timeline)[1]] == [
        (0, 1, Cause.RAMP), (1, 4, Cause.COMMUNICATION), (5, 6, Cause.COMMUNICATION),
        (11, 13, Cause.RAMP), (13, 16, Cause.COMMUNICATION),
    ]  # fmt: skip


def slow_ends(schedule: Schedule, costs: Costs, links: Links) -> dict[tuple[int, int], float]:
    """When each instruction ends, by (rank, place): equations that are put in until nothing changes any more."""
    ends: dict[tuple[int, int], float] = {}
    arrivals: dict[tuple[bool, int, int], float] = {}
    while True:
        before = dict(ends), dict(arrivals)
        link_free: dict[tuple[int, int], float] = {}
        for rank, instructions in enumerate(schedule.lists):
            for place, one in enumerate(instructions):
                start = ends.get((rank, place - 1), 0)
                if one.kind is F and one.chunk > 0:
                    start = max(start, arrivals.get((False, one.chunk, one.microbatch), 0))
                if one.kind in (B, BI) and one.chunk + 1 < schedule.placement.num_chunks:
                    start = max(start, arrivals.get((True, one.chunk, one.microbatch), 0))
                ends[rank, place] = start + costs.of(one, rank)
                if one.kind in SENDS:
                    is_gradient = one.kind is Kind.SEND_GRADIENT
                    user = one.chunk + (-1 if is_gradient else 1)
                    link = rank, schedule.placement.rank_of[user]
                    link_free[link] = max(link_free.get(link, 0), ends[rank, place]) + links.busy_s
                    arrivals[is_gradient, user, one.microbatch] = link_free[link] + links.latency_s
        if (ends, arrivals) == before:
            return ends


def random_case(seed: int) -> tuple[Schedule, Costs, Links]:
    rng = random.Random(seed)
    num_ranks, num_microbatches = rng.randint(1, 5), rng.randint(1, 7)
    makers: list[Callable[[], Schedule]] = [
        lambda: make_schedule("1f1b", num_ranks, 1, num_microbatches),
        lambda: make_schedule("gpipe", num_ranks, 1, num_microbatches),
        lambda: split_backward(num_ranks, num_microbatches),
    ]
    kinds = (F, B, BI, BW, Kind.REDUCE_GRADIENTS, Kind.SEND_ACTIVATION)
    costs = Costs({kind: [rng.randint(1, 9) for _ in range(num_ranks)] for kind in kinds})
    return rng.choice(makers)(), costs, Links(rng.randint(0, 4), rng.choice([None, 2]), rng.randint(0, 9))


@pytest.mark.parametrize("seed", range(60))
def test_random_pipelines_agree_with_a_second_computation(seed: int) -> None:
    schedule, costs, links = random_case(seed)
    timeline = simulate(schedule, costs, links)
    found = {(rank, place): span.end for rank, spans in enumerate(timeline.ranks) for place, span in enumerate(spans)}
    assert found == slow_ends(schedule, costs, links)
    assert timeline.as_schedule() == schedule
    if len(schedule.lists) > 1:
        assert found != slow_ends(schedule, costs, replace(links, latency_s=links.latency_s + 1)), "negative control"


@pytest.mark.parametrize("seed", range(60))
def test_work_and_idle_time_fill_each_row(seed: int) -> None:
    timeline = simulate(*random_case(seed))
    messages = SENDS | RECEIVES
    for spans, idle in zip(timeline.ranks, idle_times(timeline), strict=True):
        work = [(span.began, span.end) for span in spans if span.instruction.kind not in messages]
        pieces = sorted([*work, *((one.start, one.end) for one in idle)])
        assert pieces[0][0] == 0 and pieces[-1][1] == timeline.makespan
        assert all(left[1] == right[0] for left, right in pairwise(pieces))


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 6])
@pytest.mark.parametrize("num_microbatches", [2, 6, 16])
def test_gpipe_by_cause(num_ranks: int, num_microbatches: int) -> None:
    """(p - 1) (F + B) on each rank is the ramp, whatever else happens; a chunk that takes twice as long makes the
    others wait (F + B) for each microbatch; messages that take t delay the end by 2 (p - 1) t."""
    schedule = make_schedule("gpipe", num_ranks, 1, num_microbatches)
    ramp, late = 3 * (num_ranks - 1), 3 * num_microbatches
    for slow in range(num_ranks if num_ranks > 2 else 0):
        factors = [2 if chunk == slow else 1 for chunk in range(num_ranks)]
        found = facts(schedule, Costs({F: factors, B: [2 * factor for factor in factors]}))
        for rank, idle in enumerate(found.idle):
            expected = {Cause.RAMP: ramp, Cause.IMBALANCE: 0 if rank == slow else late}
            assert idle == {cause: expected.get(cause, 0) for cause in Cause}
    for idle in facts(schedule, links=Links(latency_s=5)).idle:
        assert idle == {Cause.RAMP: ramp, Cause.IMBALANCE: 0, Cause.COMMUNICATION: 10 * (num_ranks - 1), Cause.HOST: 0}


@pytest.mark.parametrize("latency", [Fraction(1, 4), 1, 3])
def test_equal_chunks_never_are_imbalance(latency: float) -> None:
    """Where messages are slow the ranks come out of step and wait for each other's work: that is communication too."""
    equal, slow = (causes(make_schedule("1f1b", 4, 1, 16), Links(latency_s=latency), last) for last in (1, 2))
    assert equal[Cause.RAMP] == 36 and equal[Cause.IMBALANCE] == 0 and equal[Cause.COMMUNICATION] >= 24 * latency
    assert slow[Cause.IMBALANCE] > 50, "negative control: the last chunk takes twice as long"


def causes(schedule: Schedule, links: Links, last: int) -> dict[Cause, float]:
    return facts(schedule, Costs({F: [1, 1, 1, last], B: [2, 2, 2, 2 * last]}), links).idle_by_cause


def test_a_wait_is_divided_by_cause() -> None:
    """Rank 2 waits 8 for its first tensor: for the forwards of two ranks, and for two messages."""
    timeline = simulate(make_schedule("gpipe", 3, 1, 1), Costs.unit(), Links(latency_s=3))
    assert idle_times(timeline)[2][:2] == (Idle(0, 2, Cause.RAMP), Idle(2, 8, Cause.COMMUNICATION))
    timeline = simulate(make_schedule("1f1b", 3, 1, 1), Costs({F: [5, 1, 1], B: 2}))
    assert idle_times(timeline)[1][:2] == (Idle(0, 1, Cause.RAMP), Idle(1, 5, Cause.IMBALANCE))


def test_a_late_host_is_seen() -> None:
    timeline = simulate(make_schedule("1f1b", 1, 1, 2), Costs.unit())
    (spans,) = timeline.ranks
    late = tuple(
        span._replace(start=span.start + 1, end=span.end + 1) if i > 1 else span for i, span in enumerate(spans)
    )
    assert idle_times(replace(timeline, ranks=(late,)))[0] == (Idle(3, 4, Cause.HOST),)
    assert idle_times(timeline)[0] == ()


def test_taking_a_tensor_that_is_there_is_no_wait_for_its_maker() -> None:
    """Where each use takes a moment, as it does when waits are recorded, the causes stay what they were."""
    schedule, costs = make_schedule("gpipe", 4, 1, 16), Costs({F: [100, 100, 200, 100], B: [200, 200, 400, 200]})
    plain = simulate(schedule, costs)
    ranks = tuple(
        tuple(span._replace(waited=span.waited + 1) if span.instruction.kind in (F, B) else span for span in spans)
        for spans in plain.ranks
    )
    before, after = facts_of(plain).idle_by_cause, facts_of(replace(plain, ranks=ranks)).idle_by_cause
    for cause in (Cause.RAMP, Cause.IMBALANCE):
        assert after[cause] == pytest.approx(before[cause], rel=0.03)
    assert 0 < after[Cause.COMMUNICATION] <= 8 * 16 * 4


def test_clocks_that_differ_a_little_are_borne() -> None:
    """A recorded tensor may have been used before it was made, by the clocks: the rows are filled all the same."""
    timeline = simulate(make_schedule("1f1b", 4, 1, 8), Costs({F: 1.0, B: 2.0}), Links(0.25))
    for shift in (-0.4, 0.3):
        moved = tuple(span._replace(start=span.start + shift, end=span.end + shift) for span in timeline.ranks[1])
        skewed = replace(timeline, ranks=(timeline.ranks[0], moved, *timeline.ranks[2:]))
        found = facts_of(skewed)
        for busy, idle in zip(found.busy, found.idle, strict=True):
            assert busy + sum(idle.values()) == pytest.approx(found.makespan)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("num_microbatches", [1, 3, 8])
def test_activations_kept(num_ranks: int, num_microbatches: int) -> None:
    """1F1B keeps p - rank microbatches (Narayanan et al. 2021, section 2.2), GPipe all of them."""
    one, all_of_them = (facts(make_schedule(name, num_ranks, 1, num_microbatches)) for name in NAMES)
    assert one.peak_activations == tuple(min(num_ranks - rank, num_microbatches) for rank in range(num_ranks))
    assert all_of_them.peak_activations == (num_microbatches,) * num_ranks


def test_activations_over_time() -> None:
    timeline = simulate(make_schedule("1f1b", 2, 1, 2), Costs.unit())
    last = [(1, 1), (4, 1), (7, 0)]  # F 1-2, B 2-4, F 4-5, B 5-7: one leaves when the other comes
    assert activations_alive(timeline)[1] == last
    assert activations_alive(timeline, [10, 300])[1] == [(when, 300 * many) for when, many in last]
    # A half backward keeps them until its weight half is done: microbatch 0 until after the input half of 1.
    (halves,) = activations_alive(simulate(split_backward(1, 2), Costs.unit()))
    assert halves == [(0, 1), (1, 2), (5, 1), (6, 0)]


def test_the_window_of_a_rank() -> None:
    """Two ranks that work without a break, one after the other: a bubble of the step, and none of their windows."""
    ranks = tuple((Span(Instruction(F, rank, 0), rank, rank + 1),) for rank in range(2))
    found = facts_of(Timeline("by hand", loop(2), 1, ranks))
    assert (found.bubble_share, found.window_ratio, found.windows) == (Fraction(1, 2), 0, (1, 1))
    gap = (*ranks[1], Span(Instruction(B, 1, 0), 4, 5))
    assert facts_of(Timeline("by hand", loop(2), 1, (ranks[0], gap))).window_ratio == 1


@pytest.mark.parametrize("seed", range(10))
def test_what_was_measured_predicts_the_same(seed: int) -> None:
    schedule, costs, _ = random_case(seed)
    links = Links(latency_s=3)
    timeline = simulate(schedule, costs, links)
    again = simulate(schedule, Costs.measured(timeline), links)
    assert again == timeline
    waited = any(span.waited for spans in timeline.ranks for span in spans)
    assert Links.measured(timeline) == (links if waited else Links())
    other = simulate(schedule, Costs({**costs.seconds, F: 100}), links)
    assert Costs.measured(other) != Costs.measured(timeline), "negative control"


def test_a_timeline_that_cannot_have_been() -> None:
    """Each rank waits for what the other one makes after it."""
    made, used = Span(Instruction(F, 0, 0), 3, 4), Span(Instruction(F, 1, 0), 0, 3, 2)
    back, gradient = Span(Instruction(BI, 0, 0), 0, 3, 2), Span(Instruction(BI, 1, 0), 3, 4)
    assert idle_times(Timeline("by hand", loop(2), 1, ((made,), (used, gradient))))
    with pytest.raises(ScheduleError, match=r"ranks \[0, 1\] of the timeline wait for each other"):
        idle_times(Timeline("by hand", loop(2), 1, ((back, made), (used, gradient))))


def without(schedule: Schedule, rank: int, kind: Kind) -> Schedule:
    kept = tuple(one for one in schedule.lists[rank] if one.kind is not kind)
    return replace(schedule, lists=tuple(kept if r == rank else one for r, one in enumerate(schedule.lists)))


def test_what_cannot_be_is_refused() -> None:
    schedule = make_schedule("1f1b", 2, 1, 2)
    unsent = without(schedule, 0, Kind.SEND_ACTIVATION)
    with pytest.raises(ScheduleError, match="rank 1 waits for the tensor of forward of chunk 1, microbatch 0"):
        simulate(unsent, Costs.unit())
    with pytest.raises(ScheduleError, match=r"no cost is given for backward of chunk 1, .*Kind\.BACKWARD"):
        simulate(schedule, Costs({F: 1}))
    with pytest.raises(ScheduleError, match=r"Kind\.FORWARD has 1 costs, and none for forward of chunk 1"):
        simulate(schedule, Costs({F: [1], B: 2}))
