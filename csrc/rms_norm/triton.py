"""RMSNorm in Triton, forward and backward, for GPUs of compute capability 8.0 and up; see cpu.cpp for the equations.

A program holds all columns of a row in one tile, so a row is read once. The weight's gradient has
two stages in a fixed order, as in cuda.cu: a program sums its own rows, then `rms_norm_sum_parts` adds the programs'
sums. Arithmetic is fp32 whatever the storage format.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS_PER_PROGRAM = 32  # of the backward: part of the definition of the weight gradient's rounding
MAX_DIM = 8192  # above it the backward's tile no longer fits a thread block's registers


@triton.jit
def rms_norm_forward(x_ptr, weight_ptr, y_ptr, rstd_ptr, dim, eps, BLOCK_DIM: tl.constexpr):
    """Row program_id(0): y = x r w, and r."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_DIM)
    inside = columns < dim
    x = tl.load(x_ptr + row * dim + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / dim + eps)
    tl.store(rstd_ptr + row, rstd)
    tl.store(y_ptr + row * dim + columns, (x * rstd * weight).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_backward(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, parts_ptr, rows, dim, ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    """Rows program_id(0) * ROWS and on: dx, and this program's part of the weight's gradient."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_DIM)
    inside = columns < dim
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    part = tl.zeros((BLOCK_DIM,), dtype=tl.float32)
    for i in range(ROWS):
        row = program * ROWS + i
        valid = columns < tl.where(row < rows, dim, 0)
        x = tl.load(x_ptr + row * dim + columns, mask=valid, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dim + columns, mask=valid, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + tl.minimum(row, rows - 1))
        normalised = x * rstd
        g = dy * weight
        mean = tl.sum(g * normalised, axis=0) / dim
        dx = (g - normalised * mean) * rstd
        tl.store(dx_ptr + row * dim + columns, dx.to(dx_ptr.dtype.element_ty), mask=valid)
        part += dy * normalised
    tl.store(parts_ptr + program * dim + columns, part, mask=inside)


@triton.jit
def rms_norm_sum_parts(parts_ptr, dweight_ptr, num_parts, dim, BLOCK_PARTS: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Columns program_id(0) * BLOCK_DIM and on: the sum of all parts, BLOCK_PARTS of them at a time, in order."""
    columns = tl.program_id(0) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    total = tl.zeros((BLOCK_DIM,), dtype=tl.float32)
    for first in range(0, num_parts, BLOCK_PARTS):
        parts = first + tl.arange(0, BLOCK_PARTS)
        inside = (parts[:, None] < num_parts) & (columns[None, :] < dim)
        offsets = parts[:, None].to(tl.int64) * dim + columns[None, :]
        total += tl.sum(tl.load(parts_ptr + offsets, mask=inside, other=0.0), axis=0)
    tl.store(dweight_ptr + columns, total.to(dweight_ptr.dtype.element_ty), mask=columns < dim)


def num_warps(block_dim: int) -> int:
    """Warps for a row of `block_dim` columns: 8 numbers a thread, 1 to 32 warps."""
    return min(32, max(1, block_dim // 256))


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x[..., D], weight[D] -> (y like x, rstd fp32 of one number a row)."""
    x, weight = x.contiguous(), weight.contiguous()
    dim = weight.numel()
    rows = x.numel() // dim
    y = torch.empty_like(x)
    rstd = x.new_empty(rows, dtype=torch.float32)
    block_dim = _block_dim(dim)
    if rows > 0:
        rms_norm_forward[(rows,)](x, weight, y, rstd, dim, eps, BLOCK_DIM=block_dim, num_warps=num_warps(block_dim))
    return y, rstd


def backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """dy, x[..., D], weight[D], rstd[rows] -> (dx like x, dweight like weight)."""
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    dim = weight.numel()
    rows = x.numel() // dim
    num_parts = triton.cdiv(rows, ROWS_PER_PROGRAM)
    dx, dweight = torch.empty_like(x), torch.empty_like(weight)
    parts = x.new_empty(num_parts, dim, dtype=torch.float32)
    block_dim = _block_dim(dim)
    if rows > 0:
        rms_norm_backward[(num_parts,)](
            *(dy, x, weight, rstd, dx, parts, rows, dim),
            ROWS=ROWS_PER_PROGRAM,
            BLOCK_DIM=block_dim,
            num_warps=num_warps(block_dim),
        )
    rms_norm_sum_parts[(triton.cdiv(dim, 64),)](parts, dweight, num_parts, dim, BLOCK_PARTS=32, BLOCK_DIM=64)
    return dx, dweight


def _block_dim(dim: int) -> int:
    if dim > MAX_DIM:
        raise ValueError(f"the Triton RMSNorm takes rows of up to {MAX_DIM} numbers, not {dim}; use cuda or reference")
    return triton.next_power_of_2(dim)
