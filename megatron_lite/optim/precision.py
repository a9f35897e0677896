"""Which dtype holds what."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """compute: parameters in use and activations. master: master weights, moments, gradient sums and reductions."""

    compute: torch.dtype
    master: torch.dtype


PRECISIONS = {
    "fp32": Precision(torch.float32, torch.float32),
    "bf16": Precision(torch.bfloat16, torch.float32),
    "fp64": Precision(torch.float64, torch.float64),
}
