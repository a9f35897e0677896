"""LayerNorm: y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension (arXiv:1607.06450).

    forward             m = mean(x), r = 1 / sqrt(mean((x - m)^2) + eps), n = (x - m) r;  y = n w + b
    gradient of x       r (g - mean(g) - n mean(g n))  with  g = dy w
    gradient of weight  sum over rows of dy n, in fp32 and in a fixed order
    gradient of bias    sum over rows of dy, the same way

The backward saves x, the weight, m and r, and computes n again. `add_layer_norm` normalises x + residual, and returns
the sum too. See norm_kernels.py for the operators. The torch backend is torch's own kernel, except for the last two:
its CPU kernel adds them in the dtype of the weight, which over 4099 rows in bf16 is wrong in the first digit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_lite.ops import dispatch, native, norm_kernels
from megatron_lite.ops.precision import wide


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str = "auto") -> Tensor:
    """LayerNorm of x[..., D] with weight[D] and bias[D]; the result has x's shape and dtype.

    fp32, bf16, fp16 and fp64; everything between load and store is fp32 (fp64 for fp64). Weight and bias have x's dtype
    or both fp32. `backend` is one of auto, reference, cpu, triton, cuda, torch, apex. Raises ValueError for one that
    cannot run, and for arguments that do not fit each other or an eps below 0.
    """
    norm_kernels.check("layer_norm", x, weight, bias, None, eps)
    choice = dispatch.select("layer_norm", backend, x.dtype, x.device.type).backend
    if choice == "torch":
        return _torch(x, weight, bias, eps)
    if choice == "reference":
        return layer_norm_reference(x, weight, bias, eps)
    if choice == "apex":
        return norm_kernels.apex_function("layer_norm", x, weight)(x, weight, bias, weight.shape, eps).to(x.dtype)
    if choice == "cpu" and native.runs_bare():
        return norm_kernels.bare_cpu("layer_norm", x, weight, bias, eps)[0]
    return getattr(torch.ops.megatron_lite, f"layer_norm_{choice}")(x, weight, bias, eps)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """x + residual, and LayerNorm of it: both like x[..., D], to whose shape and dtype residual is equal.

    The sum is rounded to x's dtype before it is normalised, as in two operations. Gradients of both results flow: that
    of x, which is that of residual too, is the sum of the two, rounded once. Otherwise as `layer_norm`.
    """
    norm_kernels.check("add_layer_norm", x, weight, bias, residual, eps)
    choice = dispatch.select("layer_norm", backend, x.dtype, x.device.type).backend
    if choice == "reference":
        return add_layer_norm_reference(x, residual, weight, bias, eps)
    if choice in ("torch", "apex"):
        total = x + residual
        return total, layer_norm(total, weight, bias, eps, backend=choice)
    if choice == "cpu" and native.runs_bare():
        total, y, _, _ = norm_kernels.bare_cpu("add_layer_norm", x, residual, weight, bias, eps)
        return total, y
    total, y, _, _ = getattr(torch.ops.megatron_lite, f"add_layer_norm_{choice}")(x, residual, weight, bias, eps)
    return total, y


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The specification of `layer_norm`, in plain torch."""
    x_wide = wide(x)
    centred = x_wide - x_wide.mean(dim=-1, keepdim=True)
    normalised = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    return (normalised * wide(weight) + wide(bias)).to(x.dtype)


def add_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The specification of `add_layer_norm`, in plain torch."""
    total = x + residual
    return total, layer_norm_reference(total, weight, bias, eps)


def _torch(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if torch.compiler.is_compiling():  # the compiler fuses the plain form
        return layer_norm_reference(x, weight, bias, eps)
    if native.runs_bare():
        return _kernel(x, weight, bias, eps)[0]
    return _LayerNorm.apply(x, weight, bias, eps)


def _kernel(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """torch's own kernel: y, and the mean and the reciprocal of the deviation of each row."""
    # On the CPU torch keeps the statistics in the weight's dtype, on CUDA in fp32 with a weight of x's dtype.
    kernel_weight, kernel_bias = (wide(t) if x.device.type == "cpu" else t.to(x.dtype) for t in (weight, bias))
    return torch.native_layer_norm(x, weight.shape, kernel_weight, kernel_bias, eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, rstd = _kernel(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    @once_differentiable  # mean and rstd are kept as numbers, which a second derivative would take for constants
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        dy = grads[0]
        kernel_weight = wide(weight) if x.device.type == "cpu" else weight.to(x.dtype)
        dx, _, _ = torch.ops.aten.native_layer_norm_backward(
            *(dy, x, weight.shape, mean, rstd, kernel_weight, kernel_weight, [True, False, False])
        )
        d_rows = wide(dy).reshape(-1, weight.numel())
        normalised = wide(x).sub(mean).mul_(rstd).view(d_rows.shape)
        dweight = normalised.mul_(d_rows).sum(dim=0)
        return dx, dweight.to(weight.dtype), d_rows.sum(dim=0).to(weight.dtype), None


norm_kernels.register("layer_norm", adds=False)
norm_kernels.register("layer_norm", adds=True)
