from __future__ import annotations

import itertools
import math
import random

import pytest

from megatron_lite.optim.grad_norm import BLOCK
from megatron_lite.zero.partition import ALIGNMENT, BucketLayout, Interval, Slot, lay_out, merge, unit_of


def check_layout(layout: BucketLayout) -> None:
    """Slots are aligned, in order and apart; the slices are aligned, equal, and cover the bucket once."""
    end = 0
    for slot in layout.slots:
        assert slot.start % ALIGNMENT == 0 and slot.start >= end
        assert slot.interval.size == math.prod(slot.shape)
        end = slot.interval.stop
    assert layout.size >= end and layout.whole == Interval(0, layout.size)
    slices = [layout.slice(index) for index in range(layout.num_slices)]
    assert [s.start for s in slices] == [0, *(s.stop for s in slices[:-1])] and slices[-1].stop == layout.size
    assert len({s.size for s in slices}) == 1
    assert all(s.start % ALIGNMENT == 0 for s in slices)


@pytest.mark.parametrize("num_slices", [1, 2, 3, 4, 8, 64])
def test_slots_and_slices(num_slices: int) -> None:
    numbers = random.Random(num_slices)
    for _ in range(50):
        shapes = [
            (f"p{i}", tuple(numbers.randint(1, 40) for _ in range(numbers.randint(1, 2))))
            for i in range(numbers.randint(1, 9))
        ]
        layout = lay_out("unit", shapes, num_slices)
        check_layout(layout)
        assert [(slot.name, slot.shape) for slot in layout.slots] == shapes
        # No more padding than alignment asks for.
        used = sum(-(-math.prod(shape) // ALIGNMENT) * ALIGNMENT for _, shape in shapes)
        assert used <= layout.size < used + ALIGNMENT * num_slices


def test_a_slot_keeps_its_place_whatever_the_number_of_slices() -> None:
    shapes = [("a", (3, 7)), ("b", (300,)), ("c", (16, 16))]
    places = {tuple((s.name, s.start) for s in lay_out("unit", shapes, n).slots) for n in (1, 2, 8)}
    assert places == {(("a", 0), ("b", 256), ("c", 768))}


def test_blocks_of_the_gradient_norm_never_cross_a_slice() -> None:
    assert ALIGNMENT % BLOCK == 0


def test_wrong_layouts_are_noticed() -> None:
    check_layout(BucketLayout("unit", (Slot("a", (5,), 0), Slot("b", (5,), 256)), 512, 2))
    for wrong in (
        BucketLayout("unit", (Slot("a", (5,), 0), Slot("b", (5,), 3)), 512, 2),  # overlaps
        BucketLayout("unit", (Slot("a", (5,), 0), Slot("b", (5,), 8)), 512, 2),  # is not aligned
        BucketLayout("unit", (Slot("a", (600,), 0),), 512, 2),  # too small
        BucketLayout("unit", (Slot("a", (5,), 0),), 512, 3),  # does not divide
        BucketLayout("unit", (Slot("a", (5,), 0),), 256, 2),  # slices are not aligned
    ):
        with pytest.raises(AssertionError):
            check_layout(wrong)


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("embedding.tokens.weight", "embedding"),
        ("embedding.positions.weight", "embedding"),
        ("layers.0.mlp.up.weight", "layers.0"),
        ("layers.11.attention_norm.weight", "layers.11"),
        ("final_norm.weight", "head"),
        ("head.weight", "head"),
    ],
)
def test_units(name: str, unit: str) -> None:
    tied = ["embedding.tokens.weight", "head.weight"]
    assert unit_of(name, []) == unit
    assert unit_of(name, tied) == (name if name in tied else unit)


def elements(intervals: list[Interval]) -> set[int]:
    return {element for interval in intervals for element in range(interval.start, interval.stop)}


def test_merged_intervals_are_the_same_elements_in_the_fewest_pieces() -> None:
    numbers = random.Random(0)
    for _ in range(300):
        starts = numbers.choices(range(40), k=numbers.randint(0, 8))
        intervals = [Interval(start, start + numbers.randint(0, 6)) for start in starts]
        merged = merge(intervals)
        assert elements(merged) == elements(intervals)
        assert all(interval.size for interval in merged)
        assert all(one.stop < other.start for one, other in itertools.pairwise(merged))


def test_intervals_intersect_as_sets_do() -> None:
    numbers = random.Random(1)
    for _ in range(500):
        one, other = (Interval(a, a + numbers.randint(0, 9)) for a in numbers.choices(range(12), k=2))
        both = one.intersect(other)
        assert both.size >= 0
        assert elements([both]) == elements([one]) & elements([other])
        assert elements([one.shift(5)]) == {element + 5 for element in elements([one])}
