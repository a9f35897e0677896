"""Bubble and peak of activations of each schedule, against what its authors published, exactly.

Costs: forward = input half = weight half = 1, a whole backward 2, messages nothing. p ranks, v chunks a rank,
m microbatches. Bubbles are in units of a chunk's forward; as a share of the computing they are divided by 3vm. Peaks
are counted in chunks times microbatches; 1/v of them are whole shares of a rank.

From which m on: a bubble of 1F1B and GPipe is that of the first microbatch on its way down and of the last one's way
back, at any m. A schedule that goes through the ranks more than once closes the gap between two rounds only where a
round has a microbatch for each rank, m >= p. ZB-H1 needs one forward on each rank to put before the first input half,
m >= p; ZB-H2 and ZB-V fill the way down and back, 2p - 1 forwards on the first rank. DualPipe-V is published for
m >= 2p.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import pytest

from megatron_lite.pipeline.instructions import Instruction, Kind
from megatron_lite.pipeline.schedules import SCHEDULES, make_schedule
from tests.pipeline.simulation import Block, check, computes, play

RANKS = (1, 2, 3, 4, 5, 8)


@dataclass(frozen=True)
class Formula:
    """All of (p, v, m). fewest: the m from which on the bubble holds."""

    bubble: Callable[[int, int, int], int]
    peak: Callable[[int, int, int], int]
    virtual_stages: tuple[int, ...] = (1,)
    fewest: Callable[[int], int] = lambda p: 1
    idle: Literal["of_step", "between"] = "of_step"


def group(p: int, m: int) -> int:
    """The most microbatches that go through a rank's chunks together: p where p divides m, or where m = qp + s, the
    least that q groups need."""
    return -(-m // max(1, m // p))


FORMULAS = {
    # Huang et al. 2019; Narayanan et al. 2021, section 2.2.1: (p - 1)/m of the computing, which is 3m.
    "gpipe": Formula(lambda p, v, m: 3 * (p - 1), lambda p, v, m: m),
    "1f1b": Formula(lambda p, v, m: 3 * (p - 1), lambda p, v, m: min(m, p)),
    # Zhuang et al. 2023, section 4: 2(p - r) - 1 in flight on rank r.
    "eager-1f1b": Formula(lambda p, v, m: 3 * (p - 1), lambda p, v, m: min(m, 2 * p - 1)),
    # Narayanan et al. 2021, section 2.2.2: (p - 1)/(vm) of 3vm. Korthikanti et al. 2022, section 4.2.3: the peak is
    # 1 + (p - 1)/(pv) times that of 1F1B, pv + p - 1 chunks, where p divides m.
    "interleaved": Formula(
        lambda p, v, m: 3 * (p - 1),
        lambda p, v, m: min(v * m, (v - 1) * group(p, m) + 2 * p - 1 if v > 1 else p),
        (1, 2, 3, 4),
        fewest=lambda p: p,
    ),
    # Lamy-Poirier 2023, section 4.1: (N_PP - 1)/(N_mb N_loop); all activations are alive at the turn.
    "breadth-first": Formula(lambda p, v, m: 3 * (p - 1), lambda p, v, m: v * m, (1, 2, 3), fewest=lambda p: p),
    # Qi et al. 2024, table 2: (p - 1)(F + B - W), and p; with v chunks, costs and shares are those of chunks.
    "zb-h1": Formula(
        lambda p, v, m: p - 1,
        lambda p, v, m: min(v * m, (v - 1) * group(p, m) + p),
        (1, 2, 3),
        fewest=lambda p: p,
        idle="between",
    ),
    # The same: (p - 1)(F + B - 2W) = 0, and 2p - 1.
    "zb-h2": Formula(lambda p, v, m: 0, lambda p, v, m: min(m, 2 * p - 1), fewest=lambda p: 2 * p - 1, idle="between"),
    # Qi et al. 2024, section 6: 0, and p whole shares, the same on all ranks.
    "zb-v": Formula(
        lambda p, v, m: 0, lambda p, v, m: min(2 * m, 2 * p), (2,), fewest=lambda p: 2 * p - 1, idle="between"
    ),
    # DeepSeek-AI, DualPipe's README, with P = 2p stages: (P/2 - 1)(F&B + B - 3W), F&B the time of a forward and a
    # backward that overlap, and P + 1. Overlapping in full, without gain, F&B = F + B: 2(p - 1), which
    # test_dualpipe_v_overlapped checks. Here they run one after the other. What a rank makes first is then there by F
    # or B earlier than in the overlapping block, and half of the bubble goes.
    "dualpipe-v": Formula(lambda p, v, m: p - 1, lambda p, v, m: min(2 * m, 2 * p + 1), (2,), fewest=lambda p: 2 * p),
}
CASES = [(name, v) for name, formula in FORMULAS.items() for v in formula.virtual_stages]


def test_every_schedule_has_a_formula() -> None:
    assert FORMULAS.keys() == SCHEDULES.keys()


def microbatches(p: int) -> list[int]:
    return sorted({1, 2, p, p + 1, 2 * p - 1, 2 * p, 2 * p + 1, 3 * p, 4 * p + 3} - {0})


def bubble(name: str, p: int, v: int, m: int) -> int:
    schedule = make_schedule(name, p, v, m)
    times = play([[(compute,) for compute in rank] for rank in computes(schedule)], schedule.placement)
    return max(times.idle_between if FORMULAS[name].idle == "between" else times.idle_of_step)


@pytest.mark.parametrize(("name", "v"), CASES)
def test_bubble(name: str, v: int) -> None:
    formula = FORMULAS[name]
    for p in RANKS:
        for m in microbatches(p):
            if m >= formula.fewest(p):
                assert bubble(name, p, v, m) == formula.bubble(p, v, m), (p, m)


@pytest.mark.parametrize(("name", "v"), CASES)
def test_one_microbatch_fewer_has_a_longer_bubble(name: str, v: int) -> None:
    """The bound from which on a formula holds is the lowest."""
    formula = FORMULAS[name]
    for p in (2, 3, 4, 8):
        m = formula.fewest(p) - 1
        if m >= 1 and (v > 1 or name not in ("interleaved", "breadth-first")):  # these are 1F1B and GPipe then
            assert bubble(name, p, v, m) > formula.bubble(p, v, m), (p, m)


@pytest.mark.parametrize(("name", "v"), CASES)
def test_peak_of_activations(name: str, v: int) -> None:
    for p in RANKS:
        for m in microbatches(p):
            assert max(check(make_schedule(name, p, v, m))) == FORMULAS[name].peak(p, v, m), (p, m)


def test_share_of_the_computing() -> None:
    """The formulas as they are published."""
    p, v, m = 4, 2, 8
    assert Fraction(bubble("1f1b", p, 1, m), 3 * m) == Fraction(p - 1, m)
    assert Fraction(bubble("interleaved", p, v, m), 3 * v * m) == Fraction(p - 1, v * m)
    assert Fraction(max(check(make_schedule("interleaved", p, v, m))), v) == p * (1 + Fraction(p - 1, p * v))
    assert Fraction(max(check(make_schedule("zb-v", p, 2, m))), 2) == p


def test_where_ranks_hold_the_same_and_where_not() -> None:
    assert check(make_schedule("1f1b", 4, 1, 9)) == [4, 3, 2, 1]
    assert check(make_schedule("eager-1f1b", 4, 1, 9)) == [7, 5, 3, 1]
    assert check(make_schedule("zb-h1", 4, 1, 9)) == [4] * 4
    assert check(make_schedule("zb-h2", 4, 1, 9)) == [7] * 4
    assert check(make_schedule("zb-v", 4, 2, 9)) == [8] * 4


def overlapping(order: list[Instruction], is_last_rank: bool) -> list[Block]:
    """A forward and the whole backward that follows it as one block; on the last rank all but the first such pair,
    which the authors leave apart to shorten the bubble."""
    blocks: list[Block] = []
    pairs = 0
    for instruction in order:
        before = blocks[-1] if blocks else ()
        if instruction.kind is Kind.BACKWARD and len(before) == 1 and before[0].kind is Kind.FORWARD:
            pairs += 1
            if not (is_last_rank and pairs == 1):
                blocks[-1] = (before[0], instruction)
                continue
        blocks.append((instruction,))
    return blocks


def test_dualpipe_v_overlapped() -> None:
    """(P/2 - 1)(F&B + B - 3W), with F&B = F + B, at unit costs and where forward and input half cost more."""
    for cost in ((1, 1, 1), (3, 3, 2)):
        forward, half, weight = cost
        costs = dict(zip((Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT), cost, strict=True))
        costs[Kind.BACKWARD] = half + weight
        for p in RANKS:
            for m in (2 * p, 2 * p + 1, 5 * p):
                schedule = make_schedule("dualpipe-v", p, 2, m)
                ranks = [overlapping(order, r == p - 1) for r, order in enumerate(computes(schedule))]
                published = (p - 1) * ((forward + half + weight) + (half + weight) - 3 * weight)
                assert max(play(ranks, schedule.placement, costs).idle_of_step) == published, (p, m, cost)


def test_a_later_weight_half_has_a_bubble() -> None:
    """Negative control: the bubble of ZB-V is seen where one weight half of one rank runs at the end."""
    schedule = make_schedule("zb-v", 4, 2, 9)
    orders = computes(schedule)
    first = next(i for i in orders[1] if i.kind is Kind.BACKWARD_WEIGHT)
    orders[1].remove(first)
    orders[1].append(first)
    times = play([[(compute,) for compute in order] for order in orders], schedule.placement)
    assert max(times.idle_between) > 0
