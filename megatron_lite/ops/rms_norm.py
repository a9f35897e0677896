"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467, equation 4).

    forward             r = 1 / sqrt(mean(x^2) + eps), one number a row;  y = x r w
    gradient of x       r (g - n mean(g n))  with  n = x r  and  g = dy w
    gradient of weight  sum over rows of dy n, in a fixed order (blocks of rows, then the blocks)

The backward saves x, the weight and r, and computes n again. `add_rms_norm` normalises x + residual, and returns the
sum too: in one pass over memory, where an addition before a norm takes two. See norm_kernels.py for the operators.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lite.ops import dispatch, native, norm_kernels
from megatron_lite.ops.precision import wide


def rms_norm(x: Tensor, weight: Tensor, eps: float, backend: str = "auto") -> Tensor:
    """RMSNorm of x[..., D] with weight[D]; the result has x's shape and dtype.

    fp32, bf16, fp16 and fp64; everything between load and store is fp32 (fp64 for fp64). The weight has x's dtype or
    fp32. `backend` is one of auto, reference, cpu, triton, cuda, apex. Raises ValueError for one that cannot run, and
    for arguments that do not fit each other or an eps below 0.
    """
    norm_kernels.check("rms_norm", x, weight, None, None, eps)
    choice = dispatch.select("rms_norm", backend, x.dtype, x.device.type).backend
    if choice == "reference":
        return rms_norm_reference(x, weight, eps)
    if choice == "apex":
        return norm_kernels.apex_function("rms_norm", x, weight)(x, weight, weight.shape, eps).to(x.dtype)
    if choice == "cpu" and native.runs_bare():
        return norm_kernels.bare_cpu("rms_norm", x, weight, eps)[0]
    return getattr(torch.ops.megatron_lite, f"rms_norm_{choice}")(x, weight, eps)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """x + residual, and RMSNorm of it: both like x[..., D], to whose shape and dtype residual is equal.

    The sum is rounded to x's dtype before it is normalised, as in two operations. Gradients of both results flow: that
    of x, which is that of residual too, is the sum of the two, rounded once. Otherwise as `rms_norm`.
    """
    norm_kernels.check("add_rms_norm", x, weight, None, residual, eps)
    choice = dispatch.select("rms_norm", backend, x.dtype, x.device.type).backend
    if choice == "reference":
        return add_rms_norm_reference(x, residual, weight, eps)
    if choice == "apex":
        total = x + residual
        return total, rms_norm(total, weight, eps, backend="apex")
    if choice == "cpu" and native.runs_bare():
        total, y, _ = norm_kernels.bare_cpu("add_rms_norm", x, residual, weight, eps)
        return total, y
    total, y, _ = getattr(torch.ops.megatron_lite, f"add_rms_norm_{choice}")(x, residual, weight, eps)
    return total, y


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The specification of `rms_norm`, in plain torch."""
    x_wide = wide(x)
    rstd = torch.rsqrt(x_wide.square().mean(dim=-1, keepdim=True) + eps)
    return (x_wide * rstd * weight.to(x_wide.dtype)).to(x.dtype)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The specification of `add_rms_norm`, in plain torch."""
    total = x + residual
    return total, rms_norm_reference(total, weight, eps)


norm_kernels.register("rms_norm", adds=False)
norm_kernels.register("rms_norm", adds=True)
