"""Cuts the output of a fused projection into its parts, whose gradients are written straight into one tensor.

Autograd's own split concatenates the gradients in backward, slowly where one of them is strided, as attention's is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def split_projections(x: Tensor, shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
    """``[T, sum of widths]`` to views of the given shapes ``[B, S, heads, D]``, with ``B * S = T`` and widths
    ``heads * D``, side by side."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return split_projections_reference(x, shapes)
    return _SplitProjections.apply(x, tuple(shapes))


def split_projections_reference(x: Tensor, shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
    """The specification of ``split_projections``, in plain torch."""
    widths = [math.prod(shape[-2:]) for shape in shapes]
    return tuple(part.view(shape) for part, shape in zip(x.split(widths, dim=-1), shapes, strict=True))


class _SplitProjections(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shapes: tuple[tuple[int, ...], ...]) -> tuple[Tensor, ...]:
        ctx.shapes, ctx.input_shape = shapes, x.shape
        return split_projections_reference(x, shapes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        whole = grads[0].new_empty(ctx.input_shape)
        for part, grad in zip(split_projections_reference(whole, ctx.shapes), grads, strict=True):
            part.copy_(grad)
        return whole, None
