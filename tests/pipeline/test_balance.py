"""The split of layers over chunks, against every split there is."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import pytest

from megatron_lite.config.layer_costs import LayerCosts
from megatron_lite.config.layout_rules import even_stages
from megatron_lite.pipeline.balance import split_layers
from megatron_lite.pipeline.instructions import Placement, loop, vee

PLACEMENTS = {
    "one rank": loop(1),
    "loop of 2": loop(2),
    "loop of 4": loop(4),
    "2 chunks each": loop(2, 2),
    "3 chunks each": loop(2, 3),
    "6 chunks": loop(3, 2),
    "alone with 3": loop(1, 3),
    "small vee": vee(2),
    "vee of 3": vee(3),
    "vee of 1": vee(1),
}
SEVERAL = {name: placement for name, placement in PLACEMENTS.items() if placement.num_chunks > placement.num_ranks}


def every_split(num_layers: int, num_chunks: int) -> Iterator[tuple[int, ...]]:
    for cut in combinations(range(1, num_layers), num_chunks - 1):
        yield tuple(end - first for first, end in pairwise((0, *cut, num_layers)))


def largest(split: Sequence[int], costs: Sequence[LayerCosts], placement: Placement) -> tuple[float, float]:
    """Of the ranks and of the chunks, added up layer by layer."""
    ranks, chunks, layer = [0.0] * placement.num_ranks, [0.0] * placement.num_chunks, 0
    for chunk, count in enumerate(split):
        rank = placement.rank_of[chunk]
        parts = list(costs[rank].layers[layer : layer + count])
        parts += [costs[rank].embedding] * (chunk == 0) + [costs[rank].head] * (chunk == placement.num_chunks - 1)
        chunks[chunk] = sum(parts)
        ranks[rank] += sum(parts)
        layer += count
    return max(ranks), max(chunks)


def cases(placement: Placement, number: int) -> Iterator[tuple[random.Random, int, float, float]]:
    for seed in range(number):
        rng = random.Random(seed)
        num_layers = rng.randint(placement.num_chunks, placement.num_chunks + 6)
        yield rng, num_layers, float(rng.randint(0, 5)), float(rng.randint(0, 30))


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
def test_layers_of_one_cost_are_split_as_well_as_can_be(placement: Placement) -> None:
    for rng, num_layers, embedding, head in cases(placement, 60):
        # A rank that recomputes has dearer layers than one that does not.
        costs = [
            LayerCosts((float(rng.randint(3, 9)),) * num_layers, embedding, head) for _ in range(placement.num_ranks)
        ]
        found = split_layers(costs, placement)
        best = min(largest(split, costs, placement) for split in every_split(num_layers, placement.num_chunks))
        assert sum(found) == num_layers and len(found) == placement.num_chunks and min(found) >= 1
        assert largest(found, costs, placement) == best


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_layers_that_differ_are_split_as_well_as_can_be_over_single_chunks(num_ranks: int) -> None:
    placement = loop(num_ranks)
    for rng, num_layers, embedding, head in cases(placement, 60):
        costs = [LayerCosts(tuple(float(rng.randint(1, 9)) for _ in range(num_layers)), embedding, head)] * num_ranks
        found = split_layers(costs, placement)
        best = min(largest(split, costs, placement) for split in every_split(num_layers, num_ranks))
        assert sum(found) == num_layers and len(found) == num_ranks
        assert largest(found, costs, placement) == best


@pytest.mark.parametrize("placement", SEVERAL.values(), ids=SEVERAL)
def test_layers_that_differ_over_several_chunks_a_rank(placement: Placement) -> None:
    """Here no optimum is promised: never worse than the split with the smallest largest chunk, and near the best."""
    ratios = []
    for rng, num_layers, embedding, head in cases(placement, 60):
        layers = tuple(float(rng.choice((4, 5))) for _ in range(num_layers))
        costs = [LayerCosts(layers, embedding, head)] * placement.num_ranks
        rank, _ = largest(split_layers(costs, placement), costs, placement)
        judged = [largest(split, costs, placement) for split in every_split(num_layers, placement.num_chunks)]
        assert rank <= max(of_rank for of_rank, chunk in judged if chunk == min(c for _, c in judged))
        ratios.append(rank / min(judged)[0])
    assert max(ratios) < 1.15, "layers of at most 5 and chunks of 1 to 3 layers: a fraction of one layer"
    assert sum(ratio == 1 for ratio in ratios) > 0.9 * len(ratios)


def test_the_largest_rank_counts_before_the_largest_chunk() -> None:
    """In a vee the first rank holds the head: its first chunk gets less, though no chunk would be larger otherwise."""
    costs = [LayerCosts((1.0,) * 8, 0.0, 6.0)] * 2
    assert split_layers(costs, vee(2)) == (1, 3, 3, 1)
    assert largest((1, 3, 3, 1), costs, vee(2)) == (8.0, 7.0)
    # The negative control: the same costs over four ranks make the head's chunk small, and only that.
    assert split_layers(costs * 2, loop(4)) == (3, 2, 2, 1)


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
def test_without_embedding_and_head_the_split_is_as_even_as_can_be(placement: Placement) -> None:
    for num_layers in range(placement.num_chunks, 20):
        costs = [LayerCosts((0.1,) * num_layers, 0.0, 0.0)] * placement.num_ranks
        found = split_layers(costs, placement)
        even = even_stages(num_layers, placement.num_chunks)
        assert largest(found, costs, placement)[0] <= largest(even, costs, placement)[0] + 1e-12
        if placement.num_chunks == placement.num_ranks:
            assert sorted(found) == sorted(even)


def test_fewer_layers_than_chunks_are_refused() -> None:
    with pytest.raises(ValueError, match="3 layers cannot fill 4 chunks"):
        split_layers([LayerCosts((1.0,) * 3, 0.0, 0.0)] * 2, vee(2))
