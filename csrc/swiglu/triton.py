"""Gated activations in Triton, forward and backward, for GPUs of compute capability 8.0 and up; see cpu.cpp for the
equations. Arithmetic is fp32 whatever the storage format.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # columns of a row that a program takes
NUM_WARPS = 4
# Registers a thread and bytes of shared memory, at most, of each kernel on sm_80 and sm_90. Shared memory is taken
# where gate and up are one column wide and lie side by side: they are dealt to the threads anew.
CEILINGS = {"swiglu_forward": (64, 4096), "swiglu_backward": (96, 4096)}


@triton.jit
def sigmoid(x):
    """s = 1 / (1 + e^-x) and 1 - s, which as a difference would lose its digits where s is near 1."""
    e = tl.exp(-x)
    s = 1.0 / (1.0 + e)
    return s, tl.where(e < 1e30, e * s, 1.0)


@triton.jit
def gelu_erf_distribution(x):
    """(1 + erf(x / sqrt(2))) / 2; Abramowitz and Stegun, 7.1.26, as activation_vec.h has it."""
    z = tl.abs(x) * 0.70710678
    t = 1.0 / (1.0 + 0.3275911 * z)
    p = 1.061405429
    p = p * t - 1.453152027
    p = p * t + 1.421413741
    p = p * t - 0.284496736
    p = p * t + 0.254829592
    tail = 0.5 * p * t * tl.exp(-z * z)
    return tl.where(x < 0.0, tail, 1.0 - tail)


@triton.jit
def value_and_slope(x, ACTIVATION: tl.constexpr):
    """a(x) and a'(x) in fp32 for an activation of ops/activation_kernels.py. NaN stays NaN."""
    if ACTIVATION == "silu":
        s, rest = sigmoid(x)
        value = x * s
        slope = s + value * rest
    elif ACTIVATION == "relu":
        value = tl.where(x < 0.0, 0.0, x)
        slope = tl.where(x > 0.0, 1.0, 0.0)
    else:
        # Beyond 20 the distribution is 0 or 1 to the last bit, and x^3 of large numbers would overflow.
        c = tl.where(x > 20.0, 20.0, tl.where(x < -20.0, -20.0, x))
        if ACTIVATION == "gelu":
            s, rest = sigmoid(c * (c * c * (2 * 0.79788456 * 0.044715) + 2 * 0.79788456))
            density = s * rest * (c * c * (6 * 0.79788456 * 0.044715) + 2 * 0.79788456)
        else:
            s = gelu_erf_distribution(c)
            density = 0.39894228 * tl.exp(-0.5 * c * c)
        value = x * s
        slope = s + c * density
    return value, slope


@triton.jit
def swiglu_forward(gate_up_ptr, out_ptr, half, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """Row program_id(0), columns program_id(1) * BLOCK and on."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < half
    gate = tl.load(gate_up_ptr + row * 2 * half + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * half + half + columns, mask=inside, other=0.0).to(tl.float32)
    value, _ = value_and_slope(gate, ACTIVATION)
    tl.store(out_ptr + row * half + columns, (value * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward(d_out_ptr, gate_up_ptr, d_gate_up_ptr, half, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """Row program_id(0), columns program_id(1) * BLOCK and on."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < half
    d_out = tl.load(d_out_ptr + row * half + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up_ptr + row * 2 * half + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * half + half + columns, mask=inside, other=0.0).to(tl.float32)
    value, slope = value_and_slope(gate, ACTIVATION)
    stored = d_gate_up_ptr.dtype.element_ty
    tl.store(d_gate_up_ptr + row * 2 * half + columns, (d_out * up * slope).to(stored), mask=inside)
    tl.store(d_gate_up_ptr + row * 2 * half + half + columns, (d_out * value).to(stored), mask=inside)


def forward(gate_up: Tensor, activation: str) -> Tensor:
    """gate_up[..., 2F] -> [..., F]."""
    gate_up = gate_up.contiguous()
    half = gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], half))
    if out.numel() > 0:
        grid = (out.numel() // half, triton.cdiv(half, BLOCK))
        swiglu_forward[grid](gate_up, out, half, ACTIVATION=activation, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return out


def backward(d_out: Tensor, gate_up: Tensor, activation: str) -> Tensor:
    """d_out[..., F], gate_up[..., 2F] -> the gradient of gate_up."""
    d_out, gate_up = d_out.contiguous(), gate_up.contiguous()
    half = gate_up.shape[-1] // 2
    d_gate_up = torch.empty_like(gate_up)
    if d_out.numel() > 0:
        grid = (d_out.numel() // half, triton.cdiv(half, BLOCK))
        swiglu_backward[grid](
            *(d_out, gate_up, d_gate_up, half), ACTIVATION=activation, BLOCK=BLOCK, num_warps=NUM_WARPS
        )
    return d_gate_up
