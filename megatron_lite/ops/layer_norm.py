"""LayerNorm: y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension (arXiv:1607.06450).

    gradient of x       torch's own kernel
    gradient of weight  sum over rows of dy n,  n = (x - mean) / sqrt(var + eps), in fp32
    gradient of bias    sum over rows of dy, in fp32

torch's CPU kernel adds the last two in the dtype of the weight: over 4099 rows in bf16 that is wrong in the first
digit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_lite.ops import dispatch, native


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str = "auto") -> Tensor:
    """LayerNorm of x[..., D] with weight[D] and bias[D]; the result has x's shape and dtype.

    fp32, bf16, fp16 and fp64; everything between load and store is fp32 (fp64 for fp64). Saves x, the weight and two
    numbers a row.
    """
    assert x.shape[-1:] == weight.shape == bias.shape, f"{tuple(x.shape)} {tuple(weight.shape)} {tuple(bias.shape)}"
    choice = dispatch.select("layer_norm", backend, x.dtype, x.device.type)
    if choice.backend == "reference" or torch.compiler.is_compiling():  # the compiler fuses the plain form
        return layer_norm_reference(x, weight, bias, eps)
    if native.runs_bare():
        return _kernel(x, weight, bias, eps)[0]
    return _LayerNorm.apply(x, weight, bias, eps)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The specification of `layer_norm`, in plain torch."""
    wide = _wide(x)
    centred = wide - wide.mean(dim=-1, keepdim=True)
    normalised = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    return (normalised * _wide(weight) + _wide(bias)).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _kernel(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """torch's own kernel: y, and the mean and the reciprocal of the deviation of each row."""
    # On the CPU torch keeps the statistics in the weight's dtype, on CUDA in fp32 with a weight of x's dtype.
    kernel_weight, kernel_bias = (_wide(t) if x.device.type == "cpu" else t.to(x.dtype) for t in (weight, bias))
    return torch.native_layer_norm(x, weight.shape, kernel_weight, kernel_bias, eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, rstd = _kernel(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        dy = grads[0]
        kernel_weight = _wide(weight) if x.device.type == "cpu" else weight.to(x.dtype)
        dx, _, _ = torch.ops.aten.native_layer_norm_backward(
            *(dy, x, weight.shape, mean, rstd, kernel_weight, kernel_weight, [True, False, False])
        )
        d_rows = _wide(dy).reshape(-1, weight.numel())
        normalised = _wide(x).sub(mean).mul_(rstd).view(d_rows.shape)
        dweight = normalised.mul_(d_rows).sum(dim=0)
        return dx, dweight.to(weight.dtype), d_rows.sum(dim=0).to(weight.dtype), None
