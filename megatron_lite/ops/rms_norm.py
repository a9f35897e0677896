"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467, equation 4).

    forward             r = 1 / sqrt(mean(x^2) + eps), one number a row;  y = x r w
    gradient of x       r (g - n mean(g n))  with  n = x r  and  g = dy w
    gradient of weight  sum over rows of dy n, in a fixed order (blocks of 32 rows, then the blocks)

The backward saves x, the weight and r, and computes n again. Each kernel is an operator
`megatron_lite::rms_norm_<backend>` with fake and autograd registrations, so torch.compile takes it as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_lite.ops import dispatch, native

_Pair = tuple[Tensor, Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float, backend: str = "auto") -> Tensor:
    """RMSNorm of x[..., D] with weight[D]; the result has x's shape and dtype.

    fp32, bf16, fp16 and fp64; everything between load and store is fp32 (fp64 for fp64). The weight has x's dtype or
    fp32. `backend` is one of auto, reference, cpu, triton, cuda; one that cannot run raises ValueError.
    """
    assert x.shape[-1:] == weight.shape, f"x[..., D] and weight[D], not {tuple(x.shape)} and {tuple(weight.shape)}"
    choice = dispatch.select("rms_norm", backend, x.dtype, x.device.type)
    chosen_triton = backend == "auto" and choice.backend == "triton"
    is_too_wide = chosen_triton and weight.numel() > native.triton_kernels("rms_norm").MAX_DIM
    if choice.backend == "reference" or is_too_wide:
        return rms_norm_reference(x, weight, eps)
    if choice.backend == "cpu" and native.runs_bare():
        return _forward_cpu(x, weight, eps)[0]
    return getattr(torch.ops.megatron_lite, f"rms_norm_{choice.backend}")(x, weight, eps)[0]


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The specification of `rms_norm`, in plain torch."""
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    rstd = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * rstd * weight.to(wide.dtype)).to(x.dtype)


def _forward_cpu(x: Tensor, weight: Tensor, eps: float) -> _Pair:
    return torch.ops.megatron_lite_cpu.rms_norm(x, weight, eps)


def _backward_cpu(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> _Pair:
    return torch.ops.megatron_lite_cpu.rms_norm_backward(dy, x, weight, rstd)


def _forward_cuda(x: Tensor, weight: Tensor, eps: float) -> _Pair:
    with torch.cuda.device(x.device):
        return torch.ops.megatron_lite_cuda.rms_norm(x, weight, eps, torch.cuda.current_stream().cuda_stream)


def _backward_cuda(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> _Pair:
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        return torch.ops.megatron_lite_cuda.rms_norm_backward(dy, x, weight, rstd, stream)


def _forward_triton(x: Tensor, weight: Tensor, eps: float) -> _Pair:
    with torch.cuda.device(x.device):
        return native.triton_kernels("rms_norm").forward(x, weight, eps)


def _backward_triton(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> _Pair:
    with torch.cuda.device(x.device):
        return native.triton_kernels("rms_norm").backward(dy, x, weight, rstd)


def _fake_forward(x: Tensor, weight: Tensor, eps: float) -> _Pair:
    rows = x.numel() // weight.numel()
    return x.new_empty(x.shape), x.new_empty(rows, dtype=torch.float32)


def _fake_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> _Pair:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _register(backend: str, dispatch_key: str, forward: Callable[..., _Pair], backward: Callable[..., _Pair]) -> None:
    """Defines the operators rms_norm_<backend> and rms_norm_<backend>_backward."""
    name = f"rms_norm_{backend}"

    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: _Pair) -> None:
        ctx.save_for_backward(inputs[0], inputs[1], output[1])
        ctx.mark_non_differentiable(output[1])

    def gradient(ctx: Any, dy: Tensor, _drstd: Tensor | None) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        dx, dweight = getattr(torch.ops.megatron_lite, f"{name}_backward")(dy, x, weight, rstd)
        return dx, dweight, None

    schema = f"{name}(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)"
    native.define_operator(schema, dispatch_key, forward, _fake_forward, gradient, setup_context)
    schema = f"{name}_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> (Tensor dx, Tensor dweight)"
    native.define_operator(schema, dispatch_key, backward, _fake_backward)


_register("cpu", "CPU", _forward_cpu, _backward_cpu)
_register("cuda", "CUDA", _forward_cuda, _backward_cuda)
_register("triton", "CUDA", _forward_triton, _backward_triton)
