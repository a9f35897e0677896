"""Rotary position embedding in Triton, for GPUs of compute capability 8.0 and up; shape.h says what it computes.

A program rotates a block of heads of one token, so it reads that token's cosines and sines once. Arithmetic is fp32,
rounded once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

PAIRS_PER_PROGRAM = 1024
NUM_WARPS = 4
# Registers a thread and bytes of shared memory, at most, of each kernel on sm_80 and sm_90.
CEILINGS = {"rotary_rotate": (96, 16384), "rotary_copy_rest": (64, 0)}


@triton.jit
def rotary_rotate(
    in_ptr, out_ptr, cos_ptr, sin_ptr, sign, heads, tokens, half, angle_batch_stride,
    in_batch, in_token, in_head, out_batch, out_token, out_head,
    INTERLEAVED: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Token program_id(0), counted over batch and tokens; heads program_id(1) * BLOCK_HEADS and on."""
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    pair = tl.arange(0, BLOCK_HALF)
    angle = batch * angle_batch_stride + token * half + pair
    cos = tl.load(cos_ptr + angle, mask=pair < half, other=0.0)[None, :]
    sin = tl.load(sin_ptr + angle, mask=pair < half, other=0.0)[None, :] * sign
    in_row = in_ptr + batch * in_batch + token * in_token + head[:, None].to(tl.int64) * in_head
    out_row = out_ptr + batch * out_batch + token * out_token + head[:, None].to(tl.int64) * out_head
    stored = out_ptr.dtype.element_ty
    if INTERLEAVED:
        number = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        inside = (head[:, None] < heads) & (number < 2 * half)
        both = tl.load(in_row + number, mask=inside, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, (BLOCK_HEADS, BLOCK_HALF, 2)))
        turned = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (BLOCK_HEADS, 2 * BLOCK_HALF))
        tl.store(out_row + number, turned.to(stored), mask=inside)
    else:
        inside = (head[:, None] < heads) & (pair[None, :] < half)
        a = tl.load(in_row + pair[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(in_row + half + pair[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(out_row + pair[None, :], (a * cos - b * sin).to(stored), mask=inside)
        tl.store(out_row + half + pair[None, :], (b * cos + a * sin).to(stored), mask=inside)


@triton.jit
def rotary_copy_rest(
    in_ptr, out_ptr, heads, tokens, first, dim,
    in_batch, in_token, in_head, out_batch, out_token, out_head,
    BLOCK_HEADS: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Numbers `first` to `dim` of the heads, which are not rotated; programs as in rotary_rotate."""
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None].to(tl.int64)
    number = first + tl.arange(0, BLOCK_REST)[None, :]
    inside = (head < heads) & (number < dim)
    rest = tl.load(in_ptr + batch * in_batch + token * in_token + head * in_head + number, mask=inside)
    tl.store(out_ptr + batch * out_batch + token * out_token + head * out_head + number, rest, mask=inside)


def blocks(columns: int, heads: int) -> tuple[int, int]:
    """Heads and columns of a program's tile, powers of two."""
    block_columns = triton.next_power_of_2(columns)
    most = max(1, PAIRS_PER_PROGRAM // block_columns)
    return min(most, triton.next_power_of_2(heads)), block_columns


def rotate(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    inverse: bool,
    q_out: Tensor,
    k_out: Tensor,
) -> None:
    """Writes q and k[B, S, heads, D], rotated by cos and sin[B or 1, S, R/2], to q_out and k_out.

    All have dense heads and any other strides; the outputs may be the inputs.
    """
    for x, out in ((q, q_out), (k, k_out)):
        batch, tokens, heads, dim = x.shape
        half = cos.shape[-1]
        if x.numel() == 0:
            continue
        strides = (*x.stride()[:3], *out.stride()[:3])
        if half > 0:
            block_heads, block_half = blocks(half, heads)
            rotary_rotate[(batch * tokens, triton.cdiv(heads, block_heads))](
                *(x, out, cos, sin, -1.0 if inverse else 1.0, heads, tokens, half),
                *(0 if cos.shape[0] == 1 else tokens * half, *strides),
                INTERLEAVED=interleaved,
                BLOCK_HEADS=block_heads,
                BLOCK_HALF=block_half,
                num_warps=NUM_WARPS,
            )
        if 2 * half < dim and x.data_ptr() != out.data_ptr():
            block_heads, block_rest = blocks(dim - 2 * half, heads)
            rotary_copy_rest[(batch * tokens, triton.cdiv(heads, block_heads))](
                *(x, out, heads, tokens, 2 * half, dim, *strides),
                BLOCK_HEADS=block_heads,
                BLOCK_REST=block_rest,
                num_warps=NUM_WARPS,
            )
