"""SwiGLU: silu(gate) * up (arXiv:2002.05202, equation 6), gate and up being the two halves of one tensor.

    forward          g s u                      with  s = 1 / (1 + e^-g)
    gradient of up   d g s
    gradient of gate d u s (1 + g (1 - s))

Only the input is saved; the backward computes s again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.ops import dispatch, native


def swiglu(gate_up: Tensor, backend: str = "auto") -> Tensor:
    """silu(first half) * second half of gate_up[..., 2F] -> [..., F], same dtype.

    fp32, bf16, fp16, fp64; everything between load and store is fp32 (fp64 for fp64).
    """
    assert gate_up.shape[-1] % 2 == 0, f"the last dimension holds gate and up, so it is even: {tuple(gate_up.shape)}"
    if dispatch.select("swiglu", backend, gate_up.dtype, gate_up.device.type).backend == "cpu":
        if native.runs_bare():
            return _forward_cpu(gate_up)
        return torch.ops.megatron_lite.swiglu_cpu(gate_up)
    if torch.compiler.is_compiling():  # the compiler fuses the plain form, and chooses itself what to keep
        return swiglu_reference(gate_up)
    return _SwiGLU.apply(gate_up)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """The specification of `swiglu`, in plain torch."""
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


class _SwiGLU(torch.autograd.Function):
    """The reference with the backward written out, so that only the input is kept between the two."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return swiglu_reference(gate_up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = _wide(gate_up).chunk(2, dim=-1)
        d_out = _wide(grads[0])
        d_gate = torch.ops.aten.silu_backward(d_out * up, gate)
        return torch.cat((d_gate, d_out * F.silu(gate)), dim=-1).to(gate_up.dtype)


def _forward_cpu(gate_up: Tensor) -> Tensor:
    return torch.ops.megatron_lite_cpu.swiglu(gate_up)


def _backward_cpu(d_out: Tensor, gate_up: Tensor) -> Tensor:
    return torch.ops.megatron_lite_cpu.swiglu_backward(d_out, gate_up)


def _fake_forward(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _fake_backward(d_out: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _gradient(ctx: Any, d_out: Tensor) -> Tensor:
    return torch.ops.megatron_lite.swiglu_cpu_backward(d_out, *ctx.saved_tensors)


native.define_operator(
    "swiglu_cpu(Tensor gate_up) -> Tensor", "CPU", _forward_cpu, _fake_forward, _gradient, _setup_context
)
native.define_operator(
    "swiglu_cpu_backward(Tensor d_out, Tensor gate_up) -> Tensor", "CPU", _backward_cpu, _fake_backward
)
