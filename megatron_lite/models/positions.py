"""Rotary position embedding: the table of angles (Su et al. 2021, RoFormer, section 3.4.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_lite.config.schema import ModelConfig, RopeScaling


def rotary_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Angle per position of each pair of channels, float64 ``[head_dim / 2]``, scaled as the config asks."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=device) / config.head_dim
    frequencies = config.rope_theta**-exponent
    return frequencies if config.rope_scaling is None else _scale(frequencies, config.rope_scaling)


def _scale(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    if scaling.type == "linear":
        return frequencies / scaling.factor
    # Llama 3.1: long wavelengths are stretched by `factor`, short ones stay, those between are interpolated.
    turns = scaling.original_max_seq_len * frequencies / (2 * math.pi)
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share = share.clamp(0, 1)
    return share * frequencies + (1 - share) * frequencies / scaling.factor


def rotary_angles(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[B or 1, S, head_dim / 2]`` for integer positions ``[B or 1, S]``.

    Computed in float64, returned in float64 for a float64 model and in float32 otherwise.
    """
    angles = positions.to(torch.float64)[..., None] * rotary_frequencies(config, positions.device)
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return angles.cos().to(table_dtype), angles.sin().to(table_dtype)
