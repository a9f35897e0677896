"""Rotary position embedding, half-split layout (arXiv:2104.09864, section 3.2.2, with Hugging Face Llama's pairing).

forward         (a, b) -> (a cos - b sin, b cos + a sin)   where a and b are the two halves of a head
gradient of x   the same rotation by the opposite angle: the rotation is linear and orthogonal
cos and sin     take no gradient; they are all that is saved
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_lite.ops import dispatch, native


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Rotates q[B, S, Hq, D] and k[B, S, Hk, D] by the angles of cos and sin, both [B or 1, S, D/2].

    Dimension i is paired with i + D/2. fp32, bf16 and fp16 with fp32 cos and sin, fp64 with fp64; the products are
    taken in the precision of cos and sin and rounded once. Returns (q, k) rotated, contiguous, in their dtypes.
    """
    assert q.dim() == k.dim() == 4 and cos.dim() == 3, "q, k are [B, S, H, D]; cos, sin are [B or 1, S, D/2]"
    assert cos.shape == sin.shape and cos.shape[-1] * 2 == q.shape[-1] == k.shape[-1], "cos and sin have D/2 columns"
    return _rotate(q, cos, sin, backend), _rotate(k, cos, sin, backend)


def rotary_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The specification of `rotary`, in plain torch."""
    return _rotate_reference(q, cos, sin), _rotate_reference(k, cos, sin)


def _rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, backend: str) -> Tensor:
    choice = dispatch.select("rotary", backend, x.dtype, x.device.type)
    if choice.backend == "cpu" and cos.dtype == torch.float32:
        if native.runs_bare():
            return _kernel_cpu(x, cos, sin, False)
        return torch.ops.megatron_lite.rotary_cpu(x, cos, sin, False)
    if torch.compiler.is_compiling():  # the compiler fuses the plain form, and chooses itself what to keep
        return _rotate_reference(x, cos, sin)
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    """The reference with the backward written out, so that only cos and sin are kept between the two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate_reference(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate_reference(grads[0], cos, -sin), None, None


def _kernel_cpu(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return torch.ops.megatron_lite_cpu.rotary(x, cos, sin, inverse)


def _fake(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.inverse = inputs[3]


def _gradient(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None, None]:
    return torch.ops.megatron_lite.rotary_cpu(d_out, *ctx.saved_tensors, not ctx.inverse), None, None, None


native.define_operator(
    "rotary_cpu(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor",
    *("CPU", _kernel_cpu, _fake, _gradient, _setup_context),
)
