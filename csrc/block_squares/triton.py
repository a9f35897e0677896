"""Sums of squares over blocks of 256 numbers in Triton, in fp64, by the tree of additions of cpu.cpp: the same bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

VALUES = 256
BLOCKS_PER_PROGRAM = 8
CEILINGS = {"block_squares_sum": (40, 128)}  # kernel -> registers, bytes of shared memory


@triton.jit
def _halved(values, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    """[BLOCKS, 2 * WIDTH] -> [BLOCKS, WIDTH]. A sum of two numbers is one addition, in whichever order."""
    return tl.sum(tl.reshape(values, (BLOCKS, 2, WIDTH)), axis=1)


@triton.jit
def block_squares_sum(values_ptr, sums_ptr, num_blocks, VALUES: tl.constexpr, BLOCKS: tl.constexpr):
    """Blocks program_id(0) * BLOCKS and on."""
    blocks = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = blocks < num_blocks
    offsets = blocks[:, None] * VALUES + tl.arange(0, VALUES // 2)[None, :]
    low = tl.load(values_ptr + offsets, mask=inside[:, None], other=0.0).to(tl.float64)
    high = tl.load(values_ptr + offsets + VALUES // 2, mask=inside[:, None], other=0.0).to(tl.float64)
    part = low * low + high * high
    part = _halved(part, BLOCKS, 64)
    part = _halved(part, BLOCKS, 32)
    part = _halved(part, BLOCKS, 16)
    part = _halved(part, BLOCKS, 8)
    part = _halved(part, BLOCKS, 4)
    part = _halved(part, BLOCKS, 2)
    tl.store(sums_ptr + blocks, tl.sum(part, axis=1), mask=inside)


def sums(values: Tensor) -> Tensor:
    """values[n * 256] in fp32, bf16 or fp16 -> float64 [n]."""
    num_blocks = values.numel() // VALUES
    result = values.new_empty(num_blocks, dtype=torch.float64)
    if num_blocks > 0:
        grid = (triton.cdiv(num_blocks, BLOCKS_PER_PROGRAM),)
        block_squares_sum[grid](values, result, num_blocks, VALUES=VALUES, BLOCKS=BLOCKS_PER_PROGRAM, num_warps=4)
    return result
