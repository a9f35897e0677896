from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
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
    "yarn": {"type": "yarn", "factor": 16.0, "original_max_seq_len": 4096},
    "yarn, short": {"type": "yarn", "factor": 3.0, "original_max_seq_len": 64, "beta_fast": 9.0, "beta_slow": 2.0},
    "yarn, one pair": {"type": "yarn", "factor": 2.0, "original_max_seq_len": 7},  # the ramp has no length
}


def config(scaling: str, theta: float, head_dim: int = 128) -> ModelConfig:
    given = SCALINGS[scaling]
    return model_config(
        head_dim=head_dim, rope_theta=theta, rope_scaling=None if given is None else RopeScaling(**given)
    )


def of_transformers(scaling: str, theta: float, head_dim: int = 128) -> Tensor:
    return embedding_of_transformers(scaling, theta, head_dim).inv_freq.double()


def embedding_of_transformers(scaling: str, theta: float, head_dim: int = 128) -> LlamaRotaryEmbedding:
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
        if own.type == "yarn":
            parameters |= {"beta_fast": own.beta_fast, "beta_slow": own.beta_slow}
            parameters |= {"original_max_position_embeddings": own.original_max_seq_len}
    hf = LlamaConfig(
        hidden_size=8 * head_dim,
        num_attention_heads=8,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters=parameters,
    )
    return LlamaRotaryEmbedding(hf)


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


def test_ntk_keeps_the_highest_frequency_and_divides_the_lowest() -> None:
    """arXiv:2309.00071, definition 1; transformers' "dynamic" scaling at `factor` times its context has this base."""
    scaled = model_config(head_dim=64, rope_theta=10000.0, rope_scaling=RopeScaling(type="ntk", factor=8.0))
    ratio = rotary_frequencies(model_config(head_dim=64, rope_theta=10000.0), CPU) / rotary_frequencies(scaled, CPU)
    assert float(ratio[0]) == 1.0 and float(ratio[-1]) == pytest.approx(8.0, rel=1e-12)
    torch.testing.assert_close(ratio.log().diff(), ratio.log()[-1:].expand(31) / 31, rtol=1e-9, atol=0)
    hf = LlamaConfig(
        hidden_size=128, num_attention_heads=2, head_dim=64, max_position_embeddings=64,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0},
    )  # fmt: skip
    theirs, _ = ROPE_INIT_FUNCTIONS["dynamic"](hf, CPU, seq_len=8 * 64)
    assert largest_relative_difference(rotary_frequencies(scaled, CPU), theirs.double()) < BOUND


@pytest.mark.parametrize("scaling", ["yarn", "yarn, short", "linear"])
def test_cosines_and_sines_are_those_of_transformers(scaling: str) -> None:
    """YaRN's factor is in them. Positions are small: transformers' angles are of float32."""
    settings, positions = config(scaling, 10000.0, 64), torch.tensor([[0, 1, 5], [7, 2, 40]])
    theirs = embedding_of_transformers(scaling, 10000.0, 64)(torch.empty(()), positions)
    for own, expected in zip(rotary_angles(settings, positions, torch.float32), theirs, strict=True):
        torch.testing.assert_close(own, expected[..., :32], rtol=0, atol=1e-5)
    if scaling != "linear":
        assert float(rotary_angles(settings, positions, torch.float64)[0].max()) > 1.1


def test_yarn_keeps_high_frequencies_and_divides_low_ones() -> None:
    plain, scaled = (rotary_frequencies(config(scaling, 10000.0), CPU) for scaling in ("none", "yarn"))
    ratio = plain / scaled
    assert (ratio == 1).any() and (ratio == 16).any() and ((ratio > 1.01) & (ratio < 15.99)).any()
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
