"""Stochastic rounding: to a neighbour, with the right mean, by random numbers that know where an element is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_lite.optim.stochastic_rounding import random_bits, round_stochastically, rounding_key

TRIALS = 4096


def rounded(values: Tensor, key: int, offsets: tuple[int, ...] = (), shape: tuple[int, ...] = ()) -> Tensor:
    out = torch.empty_like(values, dtype=torch.bfloat16)
    round_stochastically(
        values, out, key=key, offsets=offsets or (0,) * values.dim(), shape=shape or tuple(values.shape)
    )
    return out


def some_values(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    exponents = torch.randint(-20, 20, shape, generator=generator)
    return torch.randn(shape, generator=generator) * 2.0**exponents


def splitmix64(key: int, place: int) -> int:
    """Steele et al. 2014, figure 16 (mix64variant13), in Python's integers: the upper 16 bits."""
    bits = (key + place * 0x9E3779B97F4A7C15) % 2**64
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
    return (bits ^ bits >> 31) >> 48


def test_the_random_bits_are_those_of_splitmix64() -> None:
    key, places = rounding_key(1, "w", 2), torch.tensor([0, 1, 2, 12345, 2**40 + 7])
    assert random_bits(key, places).tolist() == [splitmix64(key, int(place)) for place in places]


def test_the_result_is_one_of_the_two_bfloat16_next_to_it() -> None:
    values = some_values(5000)
    result = rounded(values, 1).float()
    down = (values.view(torch.int32) & -(1 << 16)).view(torch.float32)
    up = ((values.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32)
    assert bool(((result == down) | (result == up)).all())
    assert 0.4 < float((result == up).double().mean()) < 0.6
    exact = values.to(torch.bfloat16)
    assert torch.equal(rounded(exact.float(), 1), exact), "what bf16 holds stays"


def bias(round_one: object) -> Tensor:
    """Mean error over many keys, in standard deviations of a mean of that many fair ones."""
    values = 1 + torch.arange(1, 128) / 2**14  # between 1 and the next bfloat16, 1 + 2^-7
    results = torch.stack([round_one(values, trial).double() for trial in range(TRIALS)])  # type: ignore[operator]
    share = (values.double() - 1) * 2**7
    deviation = (share * (1 - share)).sqrt() / 2**7 / math.sqrt(TRIALS)
    return (results.mean(dim=0) - values.double()) / deviation


def test_the_mean_is_right() -> None:
    z = bias(lambda values, trial: rounded(values, rounding_key(7, "w", trial + 1)))
    # 127 normal numbers: none beyond 4.5 (one run in 1,000 has one), their squares a mean of 1 (deviation 0.125).
    assert float(z.abs().max()) < 4.5 and 0.5 < float(z.square().mean()) < 1.5
    nearest = bias(lambda values, trial: values.to(torch.bfloat16))  # negative control
    assert float(nearest.abs().max()) > 50


def test_small_updates_add_up() -> None:
    """A hundred updates of a thousandth of a unit in the last place each; to the nearest, all of them are lost."""
    ulp, at_random, nearest = 2.0**-7, torch.ones(2000), torch.ones(2000)
    for update in range(1, 101):
        at_random = rounded(at_random + ulp / 1000, rounding_key(0, "w", update)).float()
        nearest = (nearest + ulp / 1000).to(torch.bfloat16).float()
    # 200,000 draws of probability 0.001: 0.1 ulp each on average, with a deviation of 0.1 / sqrt(200) = 0.007.
    assert float(at_random.mean() - 1) / ulp == pytest.approx(0.1, abs=0.03)
    assert bool((nearest == 1).all())


@pytest.mark.parametrize(
    ("rows", "columns"), [((0, 70), (0, 3000)), ((3, 41), (0, 3000)), ((0, 70), (1000, 1777)), ((69, 70), (2999, 3000))]
)
def test_a_box_is_a_box_of_the_whole(rows: tuple[int, int], columns: tuple[int, int]) -> None:
    values = some_values(70, 3000)  # several blocks
    whole = rounded(values, 5)
    box = values[slice(*rows), slice(*columns)]
    offsets = (rows[0], columns[0])
    assert torch.equal(rounded(box, 5, offsets, (70, 3000)), whole[slice(*rows), slice(*columns)])
    if offsets != (0, 0) and box.numel() > 1:  # negative control: as if it began the tensor
        assert not torch.equal(rounded(box, 5, (0, 0), (70, 3000)), whole[slice(*rows), slice(*columns)])


def test_key_parameter_and_update_matter() -> None:
    values = some_values(4000)
    keys = [rounding_key(*what) for what in ((1, "a", 1), (2, "a", 1), (1, "b", 1), (1, "a", 2))]
    results = [rounded(values, key).float() for key in keys]
    for index, one in enumerate(results):
        for other in results[:index]:
            assert 0.25 < float((one != other).double().mean()) < 0.42, "two draws differ where 2p(1-p): a third"


def test_neighbours_are_independent() -> None:
    """Of 2^18 places in a row the bits are even, and so are the pairs of a place and the next, by chi-square."""
    bits = random_bits(rounding_key(0, "w", 1), torch.arange(1 << 18)).numpy() >> 12
    for counts in (np.bincount(bits, minlength=16), np.bincount(bits[:-1] * 16 + bits[1:], minlength=256)):
        expected = counts.sum() / len(counts)
        chi = ((counts - expected) ** 2 / expected).sum()
        freedom = len(counts) - 1
        assert abs(chi - freedom) < 4 * math.sqrt(2 * freedom)


def test_what_is_no_number_stays() -> None:
    values = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 3.0e38])
    values = torch.cat([values, torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)])
    for key in range(8):
        result = rounded(values, rounding_key(0, "w", key))
        assert result[:2].tolist() == [math.inf, -math.inf]
        assert bool(result[[2, 6, 7]].isnan().all())
        assert result[3] == 0 and math.copysign(1, float(result[4])) == -1
