"""GELU by its tanh approximation: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) (arXiv:1606.08415, section 2)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.ops import dispatch


def gelu(x: Tensor, backend: str = "auto") -> Tensor:
    """GELU (tanh approximation) of x[...]; same shape and dtype. fp32, bf16, fp16, fp64; saves only its input."""
    if dispatch.select("gelu", backend, x.dtype, x.device.type).backend == "reference":
        return gelu_reference(x)
    return F.gelu(x, approximate="tanh")


def gelu_reference(x: Tensor) -> Tensor:
    """The specification of `gelu`, in plain torch."""
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    inner = math.sqrt(2.0 / math.pi) * (wide + 0.044715 * wide * wide * wide)
    return (0.5 * wide * (1.0 + torch.tanh(inner))).to(x.dtype)
