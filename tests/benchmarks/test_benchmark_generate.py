"""The benchmark of generation runs, and both contenders give the same tokens."""

from __future__ import annotations

import pytest
import torch

from benchmarks.generate import Result, run_benchmark
from tests.models.tiny import model_config


def test_both_generate_the_same_tokens() -> None:
    pytest.importorskip("transformers")
    (result,) = run_benchmark(model_config("llama"), torch.float32, threads=1, rounds=2, workloads=[(2, 5, 6)])
    assert result.same_tokens and result.num_tokens == 12
    assert len(result.ours_s) == len(result.peer_s) == 2 and min(result.ours_s) > 0


def test_the_ratio_is_of_the_rounds_themselves() -> None:
    """A machine that slows down for both changes nothing."""
    assert Result("", [1.0, 10.0, 2.0], [2.0, 20.0, 4.0], 1, True).ratio == 2.0
    assert Result("", [2.0], [1.0], 1, True).ratio == 0.5
