"""Rotary position embedding: the table of angles (Su et al. 2021, RoFormer, section 3.4.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_lite.config.schema import ModelConfig, RopeScaling


def rotary_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Angle per position of each pair of channels, float64 ``[head_dim / 2]``, scaled as the config asks."""
    theta, scaling = config.rope_theta, config.rope_scaling
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=device) / config.head_dim
    if scaling is not None and scaling.type == "ntk":
        theta = ntk_theta(theta, scaling.factor, config.head_dim)
    frequencies = theta**-exponent
    return frequencies if scaling is None else _scale(frequencies, theta, scaling)


def _scale(frequencies: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    if scaling.type == "ntk":
        return frequencies  # it is all in theta
    if scaling.type == "linear":
        return frequencies / scaling.factor
    if scaling.type == "yarn":
        share = _yarn_share(frequencies, theta, scaling)
    else:
        # Llama 3.1: long wavelengths are stretched by `factor`, short ones stay, those between are interpolated.
        turns = scaling.original_max_seq_len * frequencies / (2 * math.pi)
        share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        share = share.clamp(0, 1)
    return share * frequencies + (1 - share) * frequencies / scaling.factor


def ntk_theta(theta: float, factor: float, head_dim: int) -> float:
    """The base that leaves the shortest wavelength as it is and stretches the longest one by `factor`.

    theta factor^(D / (D - 2)), the "NTK-aware" scaling of arXiv:2309.00071, definition 1.
    """
    return theta * factor ** (head_dim / max(1, head_dim - 2))


def _yarn_share(frequencies: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """How much of each frequency stays (arXiv:2309.00071, section 3.2, in Hugging Face's reading of it).

    A ramp over the pairs: those that turn more than `beta_fast` times within the original context stay as they are,
    those that turn less than `beta_slow` times are interpolated. Its ends are moved to whole pairs.
    """
    dim = 2 * frequencies.numel()

    def pair_that_turns(turns: float) -> float:
        return dim * math.log(scaling.original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), dim - 1)
    pairs = torch.arange(dim // 2, dtype=torch.float64, device=frequencies.device)
    return 1 - ((pairs - low) / (high - low or 0.001)).clamp(0, 1)


def rotary_angles(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[B or 1, S, head_dim / 2]`` for integer positions ``[B or 1, S]``.

    YaRN multiplies both by its attention factor, and so the scores by its square.
    Computed in float64, returned in float64 for a float64 model and in float32 otherwise.
    """
    angles = positions.to(torch.float64)[..., None] * rotary_frequencies(config, positions.device)
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    scaling = config.rope_scaling
    factor = scaling.attention_factor if scaling is not None and scaling.type == "yarn" else 1.0
    return (factor * angles.cos()).to(table_dtype), (factor * angles.sin()).to(table_dtype)
