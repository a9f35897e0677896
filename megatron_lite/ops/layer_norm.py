"""LayerNorm: y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension (arXiv:1607.06450)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm of x[..., D] with weight[D] and bias[D]; the result has x's shape and dtype.

    fp32, bf16, fp16 and fp64. Statistics are taken in fp32 (fp64 for fp64). torch's own fused kernel does this
    already, saves only x, the mean and the reciprocal deviation, and its results do not depend on the number of rows.
    """
    assert x.shape[-1:] == weight.shape == bias.shape, f"{tuple(x.shape)} {tuple(weight.shape)} {tuple(bias.shape)}"
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The specification of `layer_norm`, in plain torch."""
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    centred = x.to(wide) - x.to(wide).mean(dim=-1, keepdim=True)
    normalised = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    return (normalised * weight.to(wide) + bias.to(wide)).to(x.dtype)
