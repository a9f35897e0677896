from __future__ import annotations

import itertools
import time

import pytest

from megatron_lite.distributed.topology import AXES, Layout

LAYOUTS = [
    Layout(pp, dp, cp, ep, tp)
    for pp, dp, cp, ep, tp in itertools.product((1, 2, 3), (1, 2, 5), (1, 2), (1, 3), (1, 2, 4))
]


def enumerated(layout: Layout, axes: tuple[str, ...]) -> list[dict[str, int]]:
    """The oracle: all coordinates in order of rank, the last of ``axes`` running fastest."""
    return [dict(zip(axes, c, strict=True)) for c in itertools.product(*(range(layout.size(axis)) for axis in axes))]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ranks_and_coordinates_are_a_bijection(layout: Layout) -> None:
    coordinates = enumerated(layout, AXES)
    assert len(coordinates) == layout.world_size
    assert [layout.coordinate(rank) for rank in range(layout.world_size)] == coordinates
    assert [layout.rank(**coordinate) for coordinate in coordinates] == list(range(layout.world_size))


def test_another_order_of_the_axes_is_noticed() -> None:
    layout = Layout(pp=2, dp=3, tp=2)
    actual = [layout.coordinate(rank) for rank in range(layout.world_size)]
    assert actual != enumerated(layout, tuple(reversed(AXES)))
    assert actual != enumerated(layout, ("dp", "pp", "cp", "ep", "tp"))


@pytest.mark.parametrize("layout", LAYOUTS[::7], ids=str)
def test_ranks_along_an_axis_differ_in_it_only(layout: Layout) -> None:
    coordinates = [layout.coordinate(rank) for rank in range(layout.world_size)]
    for rank, axis in itertools.product(range(layout.world_size), AXES):
        others = [
            other
            for other, coordinate in enumerate(coordinates)
            if {**coordinate, axis: -1} == {**coordinates[rank], axis: -1}
        ]
        along = layout.ranks_along(rank, axis)
        assert list(along) == others and along[layout.index(rank, axis)] == rank
        if layout.size(axis) > 1:
            assert along.step == layout.stride(axis) == others[1] - others[0]


def test_tensor_parallel_neighbours_are_consecutive() -> None:
    assert list(Layout(pp=2, dp=2, tp=4).ranks_along(5, "tp")) == [4, 5, 6, 7]
    assert list(Layout(pp=2, dp=2, tp=4).ranks_along(5, "pp")) == [5, 13]


def test_a_hundred_thousand_ranks() -> None:
    layout = Layout(pp=25, dp=500, tp=8)
    assert layout.world_size == 100_000
    assert layout.coordinate(99_999) == {"pp": 24, "dp": 499, "cp": 0, "ep": 0, "tp": 7}
    assert layout.coordinate(4_321) == {"pp": 1, "dp": 40, "cp": 0, "ep": 0, "tp": 1}
    assert layout.ranks_along(99_999, "dp") == range(96_007, 100_000, 8)
    assert layout.rank(pp=24, dp=499, tp=7) == 99_999


def test_the_cost_does_not_grow_with_the_number_of_ranks() -> None:
    """A world of 10^12 ranks, of which no list fits into memory; the median call takes microseconds."""
    layout = Layout(pp=10**4, dp=10**6, tp=10**2)
    last = layout.world_size - 1
    times = []
    for rank in range(last - 200, last):
        start = time.perf_counter()
        assert layout.rank(**layout.coordinate(rank)) == rank
        assert isinstance(layout.ranks_along(rank, "dp"), range)
        times.append(time.perf_counter() - start)
    assert sorted(times)[100] < 1e-3


@pytest.mark.parametrize("axis", AXES)
def test_an_empty_axis_is_refused(axis: str) -> None:
    with pytest.raises(ValueError, match=f"{axis}=0"):
        Layout(**{axis: 0})


def test_what_is_outside_is_refused() -> None:
    layout = Layout(pp=2, tp=2)
    for rank in (-1, 4):
        with pytest.raises(ValueError, match=f"rank {rank} is outside this layout of 4 ranks"):
            layout.coordinate(rank)
    for index in (-1, 2):
        with pytest.raises(ValueError, match=f"coordinate tp={index} is outside 0..1"):
            layout.rank(tp=index)


def test_text() -> None:
    assert str(Layout(pp=2, tp=4)) == "tp4 pp2"
    assert str(Layout()) == "1 process"
