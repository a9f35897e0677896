"""Gated activations: a(gate) * up (arXiv:2002.05202, equations 5 and 6), of the two halves of one tensor.

    forward          a(g) u
    gradient of up   d a(g)
    gradient of gate d u a'(g)

Only the input is saved; the backward computes a(g) again. See activation_kernels.py for the operators.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.ops import activation_kernels, checks, dispatch, native
from megatron_lite.ops.activation_kernels import ACTIVATIONS
from megatron_lite.ops.precision import wide


def swiglu(gate_up: Tensor, activation: str = "silu", backend: str = "auto") -> Tensor:
    """a(first half) * second half of gate_up[..., 2F] -> [..., F], same dtype.

    `activation` is silu (SwiGLU), gelu (GeGLU, by the tanh approximation), gelu_erf (GeGLU, exact) or relu (ReGLU).
    fp32, bf16, fp16, fp64; everything between load and store is fp32 (fp64 for fp64). `backend` is one of auto,
    reference, cpu, triton, cuda. Raises ValueError for an odd last dimension, another dtype, an unknown
    activation, or a backend that cannot run.
    """
    checks.require_float("swiglu", "gate_up", gate_up)
    is_even = gate_up.dim() > 0 and gate_up.shape[-1] % 2 == 0
    checks.require(is_even, "swiglu", "gate_up", gate_up, "[..., 2F], gate and up side by side")
    checks.require(activation in ACTIVATIONS, "swiglu", "activation", activation, f"one of {', '.join(ACTIVATIONS)}")
    choice = dispatch.select("swiglu", backend, gate_up.dtype, gate_up.device.type)
    if choice.backend != "reference":
        if choice.backend == "cpu" and native.runs_bare():
            return activation_kernels.bare_cpu("swiglu", activation, gate_up)
        return getattr(torch.ops.megatron_lite, f"swiglu_{choice.backend}")(gate_up, activation)
    if torch.compiler.is_compiling():  # the compiler fuses the plain form, and chooses itself what to keep
        return swiglu_reference(gate_up, activation)
    return _Recomputing.apply(gate_up, activation)


def swiglu_reference(gate_up: Tensor, activation: str = "silu") -> Tensor:
    """The specification of `swiglu`, in plain torch."""
    gate, up = wide(gate_up).chunk(2, dim=-1)
    return (activate(gate, activation) * up).to(gate_up.dtype)


def activate(x: Tensor, activation: str) -> Tensor:
    """One of ACTIVATIONS, in plain torch and in x's dtype."""
    if activation == "silu":
        return F.silu(x)
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu" else "none")


class _Recomputing(torch.autograd.Function):
    """The reference, computed once more in the backward, so that only the input is kept between the two."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        return swiglu_reference(gate_up, activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        wants_second = torch.is_grad_enabled()  # that of this gradient
        with torch.enable_grad():
            source = gate_up if wants_second else gate_up.detach().requires_grad_()
            out = swiglu_reference(source, ctx.activation)
        return torch.autograd.grad(out, source, grads[0], create_graph=wants_second)[0], None


def _fake_forward(gate_up: Tensor, activation: str) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


activation_kernels.register(
    "swiglu", "Tensor gate_up, str activation", {name: name for name in ACTIVATIONS}, _fake_forward
)
