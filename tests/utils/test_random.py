from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_lite.utils.random import BLOCK, generator, standard_normal, standard_normal_blocks

WHOLE = standard_normal(1, "w", 0, 3 * BLOCK)
EDGES = (0, 1, 17, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 5, 3 * BLOCK)


@pytest.mark.parametrize(("start", "stop"), list(itertools.combinations_with_replacement(EDGES, 2)))
def test_a_slice_is_a_slice_of_the_whole(start: int, stop: int) -> None:
    values = standard_normal(1, "w", start, stop)
    assert values.dtype == np.float64 and values.shape == (stop - start,)
    assert np.array_equal(values, WHOLE[start:stop])


def test_pieces_come_in_order_and_block_by_block() -> None:
    pieces = list(standard_normal_blocks(1, "w", 5, 2 * BLOCK + 3))
    assert [len(piece) for piece in pieces] == [BLOCK - 5, BLOCK, 3]
    assert np.array_equal(np.concatenate(pieces), WHOLE[5 : 2 * BLOCK + 3])


def test_requests_before_do_not_matter() -> None:
    standard_normal(1, "w", 0, 10)
    np.random.default_rng(0).standard_normal(100)
    assert np.array_equal(standard_normal(1, "w", 100, 200), WHOLE[100:200])


def test_a_generator_for_each_rank_would_be_noticed() -> None:
    """Negative control: numbers that begin anew at the slice are not the slice."""
    assert not np.array_equal(standard_normal(1, "w", 0, 100), WHOLE[100:200])


def test_seed_name_and_block_decide() -> None:
    names = ("w", "v", "2/w", "")
    seen = [standard_normal(seed, name, 0, 50).tobytes() for seed in (1, 2, 12) for name in names]
    assert len(set(seen)) == len(seen)
    assert generator(1, "w", 0).random() != generator(1, "w", 1).random()
    assert generator(1, "w", 3).random() == generator(1, "w", 3).random()


def test_far_away_indices_cost_no_more_than_their_block() -> None:
    far = 10**12
    assert np.array_equal(standard_normal(1, "w", far, far + 3), standard_normal(1, "w", far - 5, far + 9)[5:8])


def test_values_are_those_of_every_run_before() -> None:
    """A change here changes the initial weights of every run: numpy, the key and the counter are in them."""
    first = [-0.34258263631160163, 1.2862818968703131, 1.3490169432006838]
    assert standard_normal(1234, "embedding.tokens.weight", 0, 3).tolist() == first
    far = 5 * BLOCK
    assert standard_normal(1234, "embedding.tokens.weight", far, far + 1).tolist() == [0.014437731314786015]


def test_statistics() -> None:
    """Within five standard errors."""
    n = len(WHOLE)
    assert abs(WHOLE.mean()) < 5 / n**0.5 and abs(WHOLE.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((WHOLE**3).mean()) < 5 * (15 / n) ** 0.5 and abs((WHOLE**4).mean() - 3) < 5 * (96 / n) ** 0.5
    blocks = WHOLE.reshape(3, BLOCK)
    for one, other in itertools.combinations(blocks, 2):
        assert abs((one * other).mean()) < 5 / BLOCK**0.5
