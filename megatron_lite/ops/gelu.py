"""GELU: x Phi(x), or 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) in its place (arXiv:1606.08415, section 2).

Only the input is saved; the backward computes the rest again. Each kernel is an operator
`megatron_lite::gelu_<backend>` with fake and autograd registrations, so torch.compile takes it as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.ops import checks, dispatch, native
from megatron_lite.ops.precision import wide
from megatron_lite.ops.swiglu import ACTIVATIONS

_NUMBERS = {"tanh": ACTIVATIONS.index("gelu"), "none": ACTIVATIONS.index("gelu_erf")}


def gelu(x: Tensor, approximate: str = "tanh", backend: str = "auto") -> Tensor:
    """GELU of x[...]; same shape and dtype. `approximate` is tanh, or none for the exact function.

    fp32, bf16, fp16, fp64; everything between load and store is fp32 (fp64 for fp64). `backend` is one of auto,
    reference, cpu, triton, cuda, torch. Raises ValueError for another dtype, an unknown `approximate`, or a backend
    that cannot run.
    """
    checks.require_float("gelu", "x", x)
    checks.require(approximate in _NUMBERS, "gelu", "approximate", approximate, "tanh or none")
    choice = dispatch.select("gelu", backend, x.dtype, x.device.type)
    if choice.backend == "reference":
        return gelu_reference(x, approximate)
    if choice.backend == "torch":
        return F.gelu(x, approximate=approximate)
    if choice.backend == "cpu" and native.runs_bare():
        return _forward_cpu(x, approximate)
    return getattr(torch.ops.megatron_lite, f"gelu_{choice.backend}")(x, approximate)


def gelu_reference(x: Tensor, approximate: str = "tanh") -> Tensor:
    """The specification of `gelu`, in plain torch."""
    x_wide = wide(x)
    if approximate == "none":
        return (0.5 * x_wide * (1.0 + torch.erf(x_wide * math.sqrt(0.5)))).to(x.dtype)
    inner = math.sqrt(2.0 / math.pi) * (x_wide + 0.044715 * x_wide * x_wide * x_wide)
    return (0.5 * x_wide * (1.0 + torch.tanh(inner))).to(x.dtype)


def _forward_cpu(x: Tensor, approximate: str) -> Tensor:
    return torch.ops.megatron_lite_cpu.gelu(x, _NUMBERS[approximate])


def _backward_cpu(d_out: Tensor, x: Tensor, approximate: str) -> Tensor:
    return torch.ops.megatron_lite_cpu.gelu_backward(d_out, x, _NUMBERS[approximate])


def _forward_cuda(x: Tensor, approximate: str) -> Tensor:
    return native.run_cuda("gelu", x, _NUMBERS[approximate])


def _backward_cuda(d_out: Tensor, x: Tensor, approximate: str) -> Tensor:
    return native.run_cuda("gelu_backward", d_out, x, _NUMBERS[approximate])


def _forward_triton(x: Tensor, approximate: str) -> Tensor:
    return native.run_triton("gelu", "forward", x, ACTIVATIONS[_NUMBERS[approximate]])


def _backward_triton(d_out: Tensor, x: Tensor, approximate: str) -> Tensor:
    return native.run_triton("gelu", "backward", d_out, x, ACTIVATIONS[_NUMBERS[approximate]])


def _fake_forward(x: Tensor, approximate: str) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(d_out: Tensor, x: Tensor, approximate: str) -> Tensor:
    return x.new_empty(x.shape)


def _register(backend: str, dispatch_key: str, forward: Callable[..., Tensor], backward: Callable[..., Tensor]) -> None:
    """Defines the operators gelu_<backend> and gelu_<backend>_backward."""
    name = f"gelu_{backend}"

    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.approximate = inputs[1]

    def gradient(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:
        backward_operator = getattr(torch.ops.megatron_lite, f"{name}_backward")
        return backward_operator(d_out, *ctx.saved_tensors, ctx.approximate), None

    schema = f"{name}(Tensor x, str approximate) -> Tensor"
    native.define_operator(schema, dispatch_key, forward, _fake_forward, gradient, setup_context)
    schema = f"{name}_backward(Tensor d_out, Tensor x, str approximate) -> Tensor"
    native.define_operator(schema, dispatch_key, backward, _fake_backward)


_register("cpu", "CPU", _forward_cpu, _backward_cpu)
_register("cuda", "CUDA", _forward_cuda, _backward_cuda)
_register("triton", "CUDA", _forward_triton, _backward_triton)
