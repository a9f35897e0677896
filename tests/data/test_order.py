"""The order of the samples, and who reads which of them."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_lite.data import SampleOrder, batch_indices

MASK = 2**64 - 1


def philox_4x64_10(counter: list[int], key: list[int]) -> list[int]:
    """One block of Philox 4x64-10 in plain integers, from the paper's section 3."""
    x, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [(b >> 64) ^ x[1] ^ k[0], b & MASK, (a >> 64) ^ x[3] ^ k[1], a & MASK]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
    return x


def test_an_epoch_sorts_the_words_of_philox() -> None:
    """The definition, computed without numpy: a new numpy cannot change the order of a run that is half done."""
    num_samples, seed, epoch = 11, 2**64 - 5, 3
    words: list[int] = []
    for block in range(1, 4):  # numpy counts the blocks from 1
        words += philox_4x64_10([block, 0, 0, 0], [seed, epoch])
    expected = sorted(range(num_samples), key=lambda sample: (words[sample] >> 4, sample))
    order = SampleOrder(num_samples, seed)
    assert [order[epoch * num_samples + place] for place in range(num_samples)] == expected
    # Negative control: the next epoch is another order.
    assert [order[(epoch + 1) * num_samples + place] for place in range(num_samples)] != expected


@pytest.mark.parametrize("num_samples", [1, 2, 3, 8, 9, 1000, 4097])
def test_every_epoch_visits_every_sample_once(num_samples: int) -> None:
    order = SampleOrder(num_samples, seed=7)
    for epoch in (0, 1, 5):
        visited = [order[epoch * num_samples + place] for place in range(num_samples)]
        assert sorted(visited) == list(range(num_samples))
    if num_samples >= 1000:
        assert order.permutation(0).tolist() != order.permutation(1).tolist()
        assert order.permutation(0).tolist() != SampleOrder(num_samples, seed=8).permutation(0).tolist()
        assert order.permutation(0).tolist() != list(range(num_samples))


def test_access_is_random_and_repeatable() -> None:
    forward = [SampleOrder(50, seed=3)[k] for k in range(175)]
    order = SampleOrder(50, seed=3)
    for k in np.random.default_rng(0).permutation(175).tolist():
        assert order[k] == forward[k]


def test_the_shuffle_is_even() -> None:
    """Over many epochs, each sample comes first about equally often: chi-square with 9 degrees of freedom."""
    counts = np.bincount([SampleOrder(10, seed=1)[10 * epoch] for epoch in range(2000)], minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 27.9  # the 0.999 quantile; the seed is fixed, so it cannot flake
    assert ((np.full(10, 0) + 2000 * (np.arange(10) == 0) - 200) ** 2 / 200).sum() > 27.9  # no shuffle would fail


def test_without_shuffle_samples_come_as_they_are() -> None:
    order = SampleOrder(5, seed=3, shuffle=False)
    assert [order[k] for k in range(12)] == [k % 5 for k in range(12)]


def test_bad_orders() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        SampleOrder(0, seed=1)
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=r"2\*\*64"):
            SampleOrder(5, seed=seed)
    with pytest.raises(IndexError):
        SampleOrder(5, seed=1)[-1]


LAYOUTS = [(dp, micro) for dp in (1, 2, 3, 4, 6, 12) for micro in (1, 2, 3, 4, 6, 12) if 12 % (dp * micro) == 0]


@pytest.mark.parametrize(("dp", "micro"), LAYOUTS)
@pytest.mark.parametrize("step", [0, 1, 17])
def test_a_global_batch_is_the_same_whatever_the_layout(dp: int, micro: int, step: int) -> None:
    shares = [batch_indices(step * 12, 12, dp, rank, micro) for rank in range(dp)]
    assert all(len(places) == micro for share in shares for places in share)
    flat = [k for share in shares for places in share for k in places]
    assert flat == list(range(step * 12, step * 12 + 12))
    if step:  # negative control: an earlier step is another batch
        assert batch_indices(step * 12 - 12, 12, dp, 0, micro) != shares[0]


def test_a_rank_reads_a_contiguous_part() -> None:
    assert batch_indices(16, 8, dp=2, dp_rank=1, micro_batch_size=2) == [range(20, 22), range(22, 24)]


def test_a_batch_that_does_not_divide_names_the_nearest_that_does() -> None:
    with pytest.raises(ValueError, match=r"global_batch_size 13 .* micro_batch_size 2 x dp 3.*: 12"):
        batch_indices(0, 13, dp=3, dp_rank=0, micro_batch_size=2)
    with pytest.raises(ValueError, match="6"):
        batch_indices(0, 1, dp=3, dp_rank=0, micro_batch_size=2)
