"""``y = x W^T + b`` whose weight gradient is added into ``weight.grad`` by the matrix product itself.

Adding microbatches up costs, in plain autograd, a tensor of the weight's size that is written, read and added for each
microbatch. Where ``weight.grad`` exists and has the dtype of the product, the product adds to it instead (Megatron-LM
calls this gradient accumulation fusion), and autograd is given nothing to add.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``[T, in] -> [T, out]`` for ``weight [out, in]`` and ``bias [out]``, in any float dtype.

    Gradient of x: ``g W``; of the weight: ``g^T x``, see the file's header; of the bias: the sum of g over tokens.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


linear_reference = F.linear


def weight_gradient(weight: Tensor, grad: Tensor, x: Tensor) -> Tensor | None:
    """``grad^T x`` ``[out, in]`` of ``grad [T, out]`` and ``x [T, in]``: added to ``weight.grad``, or returned.

    To be called in a backward with the weight itself, not with a copy. None says that it has been added: a gradient
    that is there is a place to accumulate in, also under ``torch.autograd.grad``.
    """
    if weight.requires_grad and weight.grad is not None and weight.grad.dtype == grad.dtype:
        weight.grad.addmm_(grad.t(), x)
        return None
    return grad.t() @ x


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_weight = weight_gradient(weight, grad, x) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, grad.sum(dim=0) if ctx.has_bias else None
