"""LayerNorm in Triton: the kernels of rms_norm/triton.py with a mean and a bias."""

from __future__ import annotations

from torch import Tensor

from megatron_lite._csrc.rms_norm import triton as norm

CEILINGS = norm.CEILINGS


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    _, y, mean, rstd = norm.forward(x, None, weight, bias, eps)
    return y, mean, rstd


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return norm.forward(x, residual, weight, bias, eps)


def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    return norm.backward(dy, None, x, weight, mean, rstd)


def add_layer_norm_backward(
    dy: Tensor, dsum: Tensor, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    return norm.backward(dy, dsum, total, weight, mean, rstd)
