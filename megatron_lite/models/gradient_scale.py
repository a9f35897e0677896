"""A factor on a gradient alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x itself, of any shape and dtype; on the way back its gradient times ``factor``, in the gradient's dtype.

    What ``factor * x + (1 - factor) * x.detach()`` is for (GLM-130B, arXiv:2210.02414, section 2.2), without the
    rounding that this does to x. A factor of 1 leaves no trace in the graph.
    """
    return x if factor == 1.0 else _ScaledGradient.apply(x, factor)
