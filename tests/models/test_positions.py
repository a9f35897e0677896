from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_lite.config.schema import ModelConfig, RopeScaling
from megatron_lite.models.positions import rotary_angles, rotary_frequencies
from tests.models.tiny import model_config

CPU = torch.device("cpu")
# transformers computes in float32: the exponent is rounded at 6e-8, which the power multiplies by ln(theta) < 14.
BOUND = 2e-6
SCALINGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "linear": {"type": "linear", "factor": 4.0},
    "llama 3.1": {"type": "llama3", "factor": 8.0, "original_max_seq_len": 8192},
    "llama 3.2": {"type": "llama3", "factor": 32.0, "original_max_seq_len": 8192},
    "short": {
        "type": "llama3",
        "factor": 3.0,
        "low_freq_factor": 1.5,
        "high_freq_factor": 2.5,
        "original_max_seq_len": 64,
    },
}


def config(scaling: str, theta: float, head_dim: int = 128) -> ModelConfig:
    given = SCALINGS[scaling]
    return model_config(
        head_dim=head_dim, rope_theta=theta, rope_scaling=None if given is None else RopeScaling(**given)
    )


def of_transformers(scaling: str, theta: float, head_dim: int = 128) -> Tensor:
    given = SCALINGS[scaling]
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if given is not None:
        own = RopeScaling(**given)
        parameters |= {"rope_type": own.type, "factor": own.factor}
        if own.type == "llama3":
            parameters |= {
                "low_freq_factor": own.low_freq_factor,
                "high_freq_factor": own.high_freq_factor,
                "original_max_position_embeddings": own.original_max_seq_len,
            }
    hf = LlamaConfig(
        hidden_size=8 * head_dim,
        num_attention_heads=8,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters=parameters,
    )
    return LlamaRotaryEmbedding(hf).inv_freq.double()


def largest_relative_difference(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape and one.numel() > 0
    return float(((one - other) / other).abs().max())


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_frequencies_are_those_of_transformers(scaling: str, theta: float) -> None:
    for head_dim in (8, 128):
        own = rotary_frequencies(config(scaling, theta, head_dim), CPU)
        assert own.dtype == torch.float64
        assert largest_relative_difference(own, of_transformers(scaling, theta, head_dim)) < BOUND


def test_other_settings_are_noticed() -> None:
    expected = of_transformers("llama 3.1", 500000.0)
    for scaling, theta in (("none", 500000.0), ("llama 3.2", 500000.0), ("linear", 500000.0), ("llama 3.1", 501000.0)):
        assert largest_relative_difference(rotary_frequencies(config(scaling, theta), CPU), expected) > 100 * BOUND


def test_llama3_scaling_has_all_three_bands() -> None:
    plain = rotary_frequencies(config("none", 500000.0), CPU)
    ratio = plain / rotary_frequencies(config("llama 3.1", 500000.0), CPU)
    assert (ratio == 1).any() and (ratio == 8).any() and ((ratio > 1.01) & (ratio < 7.99)).any()
    # Rounding aside, waves are never stretched less than longer ones.
    assert (ratio.diff() > -1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_angles(dtype: torch.dtype) -> None:
    """Right to the last bit of the table's dtype also 131,071 tokens away, where angles made in float32 are not."""
    settings = config("none", 10000.0, head_dim=8)
    positions = torch.tensor([[0, 1, 131071], [5, 0, 7]])
    cos, sin = rotary_angles(settings, positions, dtype)
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert cos.shape == sin.shape == (2, 3, 4) and cos.dtype == sin.dtype == table_dtype
    bound = 1e-10 if dtype == torch.float64 else 2.0**-24
    for b, s, pair in ((0, 0, 0), (0, 1, 3), (0, 2, 0), (0, 2, 1), (1, 0, 2)):
        angle = int(positions[b, s]) * 10000.0 ** (-2 * pair / 8)
        assert abs(float(cos[b, s, pair]) - math.cos(angle)) <= bound
        assert abs(float(sin[b, s, pair]) - math.sin(angle)) <= bound
    in_float32 = positions[0, 2].float() * (10000.0 ** -(torch.arange(0, 8, 2) / 8)).float()
    assert (in_float32.cos() - cos[0, 2].float()).abs().max() > 1e-4
