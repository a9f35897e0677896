"""GELU in Triton, forward and backward, for GPUs of compute capability 8.0 and up, element by element in fp32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lite._csrc.swiglu.triton import value_and_slope

BLOCK = 1024  # numbers that a program takes
NUM_WARPS = 4
# Registers a thread and bytes of shared memory, at most, of each kernel on sm_80 and sm_90.
CEILINGS = {"gelu_forward": (64, 0), "gelu_backward": (64, 0)}


@triton.jit
def gelu_forward(x_ptr, out_ptr, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """Numbers program_id(0) * BLOCK and on: out = a(x)."""
    numbers = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = numbers < count
    value, _ = value_and_slope(tl.load(x_ptr + numbers, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    tl.store(out_ptr + numbers, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gelu_backward(d_out_ptr, x_ptr, d_x_ptr, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """Numbers program_id(0) * BLOCK and on: d_x = d_out a'(x)."""
    numbers = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = numbers < count
    d_out = tl.load(d_out_ptr + numbers, mask=inside, other=0.0).to(tl.float32)
    _, slope = value_and_slope(tl.load(x_ptr + numbers, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    tl.store(d_x_ptr + numbers, (d_out * slope).to(d_x_ptr.dtype.element_ty), mask=inside)


def forward(x: Tensor, activation: str) -> Tensor:
    """GELU of x[...], for the activations gelu and gelu_erf."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel() > 0:
        grid = (triton.cdiv(x.numel(), BLOCK),)
        gelu_forward[grid](x, out, x.numel(), ACTIVATION=activation, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return out


def backward(d_out: Tensor, x: Tensor, activation: str) -> Tensor:
    """d_out and x, both [...], to the gradient of x."""
    d_out, x = d_out.contiguous(), x.contiguous()
    d_x = torch.empty_like(x)
    if x.numel() > 0:
        grid = (triton.cdiv(x.numel(), BLOCK),)
        gelu_backward[grid](d_out, x, d_x, x.numel(), ACTIVATION=activation, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return d_x
