"""GELU: x Phi(x), or 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) in its place (arXiv:1606.08415, section 2).

Only the input is saved; the backward computes the rest again. See activation_kernels.py for the operators.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.ops import activation_kernels, checks, dispatch, native
from megatron_lite.ops.precision import wide

_ACTIVATION_OF = {"tanh": "gelu", "none": "gelu_erf"}


def gelu(x: Tensor, approximate: str = "tanh", backend: str = "auto") -> Tensor:
    """GELU of x[...]; same shape and dtype. `approximate` is tanh, or none for the exact function.

    fp32, bf16, fp16, fp64; everything between load and store is fp32 (fp64 for fp64). `backend` is one of auto,
    reference, cpu, triton, cuda, torch. Raises ValueError for another dtype, an unknown `approximate`, or a backend
    that cannot run.
    """
    checks.require_float("gelu", "x", x)
    checks.require(approximate in _ACTIVATION_OF, "gelu", "approximate", approximate, "tanh or none")
    choice = dispatch.select("gelu", backend, x.dtype, x.device.type)
    if choice.backend == "reference":
        return gelu_reference(x, approximate)
    if choice.backend == "torch":
        return F.gelu(x, approximate=approximate)
    if choice.backend == "cpu" and native.runs_bare():
        return activation_kernels.bare_cpu("gelu", _ACTIVATION_OF[approximate], x)
    return getattr(torch.ops.megatron_lite, f"gelu_{choice.backend}")(x, approximate)


def gelu_reference(x: Tensor, approximate: str = "tanh") -> Tensor:
    """The specification of `gelu`, in plain torch."""
    x_wide = wide(x)
    if approximate == "none":
        return (0.5 * x_wide * (1.0 + torch.erf(x_wide * math.sqrt(0.5)))).to(x.dtype)
    inner = math.sqrt(2.0 / math.pi) * (x_wide + 0.044715 * x_wide * x_wide * x_wide)
    return (0.5 * x_wide * (1.0 + torch.tanh(inner))).to(x.dtype)


def _fake_forward(x: Tensor, approximate: str) -> Tensor:
    return x.new_empty(x.shape)


activation_kernels.register("gelu", "Tensor x, str approximate", _ACTIVATION_OF, _fake_forward)
