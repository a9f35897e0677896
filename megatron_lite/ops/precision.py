"""What the references and statistics of the ops are computed in: fp32, and fp64 for fp64."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """x in `wide_dtype` of its dtype."""
    return x.to(wide_dtype(x.dtype))
