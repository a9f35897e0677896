"""The choice of a token, against transformers' processors and against the probabilities themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_lite.inference import sampling


def some_logits(rows: int = 4, vocab_size: int = 50) -> Tensor:
    return 3 * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.3])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    transformers = pytest.importorskip("transformers")
    logits, ids = some_logits(), torch.tensor([[1, 2, 2, 3], [7, 7, 7, 7], [0, 49, 5, 6], [1, 2, 3, 4]])
    seen = torch.zeros(4, 50, dtype=torch.bool).scatter(1, ids, True)
    expected = transformers.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    assert torch.equal(sampling.penalise_repetition(logits, seen, penalty), expected)
    assert torch.equal(expected, logits) == (penalty == 1.0)


@pytest.mark.parametrize("k", [1, 5, 50, 80])
def test_top_k_is_that_of_transformers(k: int) -> None:
    transformers = pytest.importorskip("transformers")
    logits = some_logits().round()  # so that some are equal, which all stay
    assert torch.equal(sampling.keep_top_k(logits, k), transformers.TopKLogitsWarper(k)(None, logits))


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.999])
def test_top_p_is_that_of_transformers(p: float) -> None:
    transformers = pytest.importorskip("transformers")
    logits = some_logits().double()
    kept = sampling.keep_top_p(logits, p)
    assert torch.equal(kept, transformers.TopPLogitsWarper(p)(None, logits))
    assert kept.isinf().any() and kept.isfinite().any(dim=1).all()


def test_draws_follow_the_distribution() -> None:
    """Chi-squared over 40,000 draws with fixed seeds: 49 degrees of freedom, of which 85.4 is the 99.9th percentile."""
    distribution = sampling.probabilities(some_logits(1), temperature=2.0)
    chances = sampling.uniforms(seed=5, prompt=0, count=40_000)
    counts = sampling.draw(distribution.expand(len(chances), -1), chances).bincount(minlength=50)
    expected = len(chances) * distribution[0]
    assert expected.min() > 5
    assert ((counts - expected) ** 2 / expected).sum() < 85.4
    colder = len(chances) * sampling.probabilities(some_logits(1), temperature=1.9)[0]  # the control
    assert ((counts - colder) ** 2 / colder).sum() > 85.4


def test_top_k_and_top_p_leave_only_what_they_keep() -> None:
    logits = some_logits(1)
    chances = sampling.uniforms(seed=1, prompt=0, count=20_000)
    for k, p in ((3, 1.0), (None, 0.6), (10, 0.8)):
        distribution = sampling.probabilities(logits, 2.0, k, p)
        drawn = set(sampling.draw(distribution.expand(len(chances), -1), chances).tolist())
        assert drawn == set(distribution[0].nonzero()[:, 0].tolist())
        assert 1 < len(drawn) < 50
    top = sampling.probabilities(logits, 2.0, top_k=10)[0]
    both = sampling.probabilities(logits, 2.0, top_k=10, top_p=0.8)[0]
    mass = top.sort(descending=True).values.cumsum(0)
    assert int((both > 0).sum()) == int((mass < 0.8).sum()) + 1  # top-p is of what top-k has left


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    distribution = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]], dtype=torch.float64)
    chances = torch.tensor([0.0, 0.25, 0.5 - 2**-53, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert sampling.draw(distribution.expand(5, -1), chances).tolist() == [1, 1, 1, 3, 3]
    thirds = torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0.0]], dtype=torch.float64) * (1 - 2**-53)
    assert sampling.draw(thirds, chances[-1:]).tolist() == [2]


def test_numbers_belong_to_the_seed_the_prompt_and_the_place() -> None:
    first = sampling.uniforms(3, 1, 10)
    assert torch.equal(sampling.uniforms(3, 1, 1000)[:10], first)
    assert not torch.equal(sampling.uniforms(3, 2, 10), first)
    assert not torch.equal(sampling.uniforms(4, 1, 10), first)
    assert first.dtype == torch.float64 and first.min() >= 0 and first.max() < 1
