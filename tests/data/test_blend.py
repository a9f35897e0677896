"""Several sources with weights: how many samples of each, which, and that only the number of the sample decides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_lite.data import BlendedDataset, BlendedOrder, IndexedWriter, SampleOrder, TokenDataset
from megatron_lite.data.blend import BLOCK, integer_shares
from megatron_lite.data.index import fill_blend

WEIGHTS = [[1.0], [0.7, 0.3], [1e-6, 1.0], [5, 57, 1, 57, 36, 38, 13], [1 / k for k in range(1, 12)], [0.25] * 4]


def largest_difference(sources: np.ndarray, weights: list[float]) -> float:
    """The most that any source is ahead of its share or behind, samples, over all prefixes."""
    places = np.arange(1, len(sources) + 1)
    shares = np.array(weights) / sum(weights)
    return max(float(np.abs(np.cumsum(sources == s) - share * places).max()) for s, share in enumerate(shares))


def blend_of(weights: list[float], num: int) -> np.ndarray:
    sources = np.empty(num, dtype=np.uint16)
    fill_blend(integer_shares(weights), np.zeros(len(weights), dtype=np.int64), sources)
    return sources


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_prefix_holds_each_source_to_within_one_sample(weights: list[float]) -> None:
    # The weights are rounded to 2**-40, so that a difference of just below one sample may become one.
    assert largest_difference(blend_of(weights, 5000), weights) < 1 + 1e-6


def test_the_largest_deficit_first_would_not_do() -> None:
    """Negative control: the obvious rule, which takes whoever is furthest behind, leaves the bound."""
    weights = WEIGHTS[3]
    shares, counts, sources = np.array(weights) / sum(weights), np.zeros(len(weights)), []
    for place in range(207):
        sources.append(int(np.argmax(shares * (place + 1) - counts)))
        counts[sources[-1]] += 1
    assert largest_difference(np.array(sources), weights) > 1.01


def test_known_blends() -> None:
    assert blend_of([1, 1], 6).tolist() == [0, 1, 0, 1, 0, 1]
    assert blend_of([3, 1], 8).tolist() == [0, 0, 0, 1, 0, 0, 0, 1]
    assert blend_of([0.2, 0.8], 5).tolist().count(0) == 1


def test_weights_of_any_sum_are_the_same_blend() -> None:
    assert integer_shares([0.7, 0.3]).tolist() == integer_shares([1.4, 0.6]).tolist()
    assert integer_shares([7, 3]).sum() == 2**40 == integer_shares([1e-30, 1.0, 1e-30]).sum()
    assert integer_shares([1e-30, 1.0]).min() == 1
    assert integer_shares([0.7, 0.3]).tolist() != integer_shares([0.6, 0.4]).tolist()  # negative control


SIZES = (7, 20, 3)


def order_of(weights: list[float], seed: int = 5, shuffle: bool = True, num_planned: int = 0) -> BlendedOrder:
    orders = [SampleOrder(size, seed, shuffle, source=number) for number, size in enumerate(SIZES)]
    return BlendedOrder(orders, weights, num_planned=num_planned)


def test_each_source_has_its_own_epochs() -> None:
    order = order_of([0.5, 0.3, 0.2])
    ids = order.ids(0, 200)
    assert order.num_samples == 30
    bounds = np.cumsum([0, *SIZES])
    for number, size in enumerate(SIZES):
        own = ids[(ids >= bounds[number]) & (ids < bounds[number + 1])] - bounds[number]
        alone = SampleOrder(size, seed=5, source=number)
        assert own.tolist() == [alone[k] for k in range(len(own))]
        assert len(own) > 2 * size or number == 1
        for epoch in range(len(own) // size):
            assert sorted(own[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_sources_of_one_size_are_shuffled_apart() -> None:
    first, second = (SampleOrder(50, seed=5, source=number).permutation(0).tolist() for number in (0, 1))
    assert first != second
    assert first == SampleOrder(50, seed=5).permutation(0).tolist()  # one source alone is source 0


def test_access_is_random_and_repeatable_across_blocks() -> None:
    forward = order_of([0.5, 0.3, 0.2], num_planned=3 * BLOCK).ids(0, 3 * BLOCK + 10)
    order = order_of([0.5, 0.3, 0.2])  # plans nothing ahead
    for first in (2 * BLOCK - 3, 5, 3 * BLOCK + 2, 0, BLOCK, BLOCK - 1, 2 * BLOCK):
        assert order.ids(first, 8).tolist() == forward[first : first + 8].tolist()
    assert order.ids(BLOCK - 5, 2 * BLOCK).tolist() == forward[BLOCK - 5 : 3 * BLOCK - 5].tolist()
    assert order.ids(3, 0).tolist() == []
    with pytest.raises(IndexError):
        order.ids(-1, 1)
    # Negative control: weights and seed count.
    assert order_of([0.5, 0.2, 0.3]).ids(0, 50).tolist() != forward[:50].tolist()
    assert order_of([0.5, 0.3, 0.2], seed=6).ids(0, 50).tolist() != forward[:50].tolist()


def test_a_blended_dataset_reads_the_samples_of_its_sources(tmp_path: Path) -> None:
    from megatron_lite.data.dataset import SampleRows

    sources = []
    for number, size in enumerate((9, 21, 5)):
        with IndexedWriter(tmp_path / f"s{number}", "iHi"[number]) as writer:
            writer.add_document(list(range(100 * number, 100 * number + size)))
        sources.append(TokenDataset([tmp_path / f"s{number}"], 4, isolate_documents=True))
    blend = BlendedDataset(sources)
    assert len(blend) == 2 + 5 + 1
    ids = np.array([7, 0, 2, 6, 1, 3])
    out = SampleRows.empty(6, 4, True)
    blend.fill(ids, np.array([5, 4, 3, 2, 1, 0]), out)
    firsts = [200, 0, 100, 116, 4, 104]
    assert out.tokens[::-1].tolist() == [list(range(first, first + 4)) for first in firsts]
    assert out.targets[::-1].tolist() == [list(range(first + 1, first + 5)) for first in firsts]
    assert out.documents is not None and out.positions is not None
    assert (out.documents == 0).all() and (out.positions == np.arange(4)).all()
