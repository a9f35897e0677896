"""RMSNorm in Triton, forward and backward, with and without an addition before it, for GPUs of compute capability 8.0
and up; see common/norm_rows.h for the equations.

A program takes a row in tiles of BLOCK_DIM columns. A row of one tile is read once; a longer one is read again for
the last step, mostly from the L2 cache. The weight's gradient has two stages in a fixed order, as in cuda.cu: a program
sums its own rows, then `norm_sum_parts` adds the programs' sums. Arithmetic is fp32 whatever the storage format.
layer_norm/triton.py uses these kernels too: CENTRED is LayerNorm, whose bias and mean RMSNorm lacks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS_PER_PROGRAM = 32  # of the backward: part of the definition of the weight gradient's rounding
MAX_BLOCK_DIM = 8192  # above it the backward's tile no longer fits a thread block's registers

# kernel -> (registers, bytes of shared memory)
CEILINGS = {"norm_forward": (96, 4096), "norm_backward": (160, 65536), "norm_sum_parts": (48, 2048)}


@triton.jit
def norm_forward(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, sum_ptr, y_ptr, mean_ptr, rstd_ptr, dim, eps,
    CENTRED: tl.constexpr, ADDS: tl.constexpr, ONE_TILE: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Row program_id(0): [sum = x + residual,] y = n w [+ b], [the mean,] and r."""
    row = tl.program_id(0).to(tl.int64)
    start = row * dim
    columns = tl.arange(0, BLOCK_DIM)
    total = tl.zeros((BLOCK_DIM,), dtype=tl.float32)
    x = tl.zeros((BLOCK_DIM,), dtype=tl.float32)
    for first in range(0, BLOCK_DIM if ONE_TILE else dim, BLOCK_DIM):
        inside = first + columns < dim
        x = tl.load(x_ptr + start + first + columns, mask=inside, other=0.0).to(tl.float32)
        if ADDS:
            residual = tl.load(residual_ptr + start + first + columns, mask=inside, other=0.0).to(tl.float32)
            stored = (x + residual).to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + start + first + columns, stored, mask=inside)
            x = stored.to(tl.float32)
        total += x if CENTRED else x * x
    mean_square = tl.sum(total, axis=0) / dim
    mean = 0.0
    if CENTRED:
        mean = mean_square
        squares = tl.zeros((BLOCK_DIM,), dtype=tl.float32)
        for first in range(0, BLOCK_DIM if ONE_TILE else dim, BLOCK_DIM):
            inside = first + columns < dim
            if not ONE_TILE:
                x = _again(x_ptr, residual_ptr, sum_ptr, start + first + columns, inside, ADDS)
            squares += tl.where(inside, (x - mean) * (x - mean), 0.0)
        mean_square = tl.sum(squares, axis=0) / dim
        tl.store(mean_ptr + row, mean)
    rstd = 1.0 / tl.sqrt(mean_square + eps)
    tl.store(rstd_ptr + row, rstd)
    for first in range(0, BLOCK_DIM if ONE_TILE else dim, BLOCK_DIM):
        inside = first + columns < dim
        if not ONE_TILE:
            x = _again(x_ptr, residual_ptr, sum_ptr, start + first + columns, inside, ADDS)
        y = (x - mean) * rstd * tl.load(weight_ptr + first + columns, mask=inside, other=0.0).to(tl.float32)
        if CENTRED:
            y += tl.load(bias_ptr + first + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + start + first + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _again(x_ptr, residual_ptr, sum_ptr, offsets, inside, ADDS: tl.constexpr):
    """The input of the norm, computed again: what another thread stored cannot be read without a barrier."""
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        residual = tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        x = (x + residual).to(sum_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _parts_of_tiles(
    dy_ptr, input_ptr, mean_ptr, rstd_ptr, weight_parts_ptr, bias_parts_ptr, rows, dim,
    CENTRED: tl.constexpr, ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """The parts of this program's rows, tile after tile, so that a tile's part stays in registers."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_DIM)
    for first in range(0, dim, BLOCK_DIM):
        weight_part = tl.zeros((BLOCK_DIM,), dtype=tl.float32)
        bias_part = tl.zeros((BLOCK_DIM,), dtype=tl.float32)
        for i in range(ROWS):
            row = program * ROWS + i
            inside = first + columns < tl.where(row < rows, dim, 0)
            offsets = row * dim + first + columns
            x = tl.load(input_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + tl.minimum(row, rows - 1))
            if CENTRED:
                x -= tl.load(mean_ptr + tl.minimum(row, rows - 1))
                bias_part += dy
            weight_part += dy * (x * rstd)
        inside = first + columns < dim
        tl.store(weight_parts_ptr + program * dim + first + columns, weight_part, mask=inside)
        if CENTRED:
            tl.store(bias_parts_ptr + program * dim + first + columns, bias_part, mask=inside)


@triton.jit
def norm_backward(
    dy_ptr, dsum_ptr, input_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, weight_parts_ptr, bias_parts_ptr, rows, dim,
    CENTRED: tl.constexpr, ADDS: tl.constexpr, ONE_TILE: tl.constexpr, ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Rows program_id(0) * ROWS and on: dx, and this program's parts of the gradients of weight and bias.

    Rows of one tile are gone through once. Longer ones are gone through again for the parts.
    """
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_DIM)
    weight_part = tl.zeros((BLOCK_DIM,), dtype=tl.float32)
    bias_part = tl.zeros((BLOCK_DIM,), dtype=tl.float32)
    for i in range(ROWS):
        row = program * ROWS + i
        width = tl.where(row < rows, dim, 0)
        rstd = tl.load(rstd_ptr + tl.minimum(row, rows - 1))
        mean = 0.0
        if CENTRED:
            mean = tl.load(mean_ptr + tl.minimum(row, rows - 1))
        sum_g = tl.zeros((BLOCK_DIM,), dtype=tl.float32)
        sum_gn = tl.zeros((BLOCK_DIM,), dtype=tl.float32)
        n = tl.zeros((BLOCK_DIM,), dtype=tl.float32)
        g = tl.zeros((BLOCK_DIM,), dtype=tl.float32)
        for first in range(0, BLOCK_DIM if ONE_TILE else dim, BLOCK_DIM):
            inside = first + columns < width
            offsets = row * dim + first + columns
            x = tl.load(input_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            n = (x - mean) * rstd
            g = dy * tl.load(weight_ptr + first + columns, mask=inside, other=0.0).to(tl.float32)
            sum_gn += g * n
            if CENTRED:
                sum_g += g
            if ONE_TILE:
                weight_part += dy * n
                if CENTRED:
                    bias_part += dy
        mean_gn = tl.sum(sum_gn, axis=0) / dim
        mean_g = 0.0
        if CENTRED:
            mean_g = tl.sum(sum_g, axis=0) / dim
        for first in range(0, BLOCK_DIM if ONE_TILE else dim, BLOCK_DIM):
            inside = first + columns < width
            offsets = row * dim + first + columns
            if not ONE_TILE:
                x = tl.load(input_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
                dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
                n = (x - mean) * rstd
                g = dy * tl.load(weight_ptr + first + columns, mask=inside, other=0.0).to(tl.float32)
            dx = (g - mean_g - n * mean_gn) * rstd
            if ADDS:
                dx += tl.load(dsum_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if ONE_TILE:
        inside = columns < dim
        tl.store(weight_parts_ptr + program * dim + columns, weight_part, mask=inside)
        if CENTRED:
            tl.store(bias_parts_ptr + program * dim + columns, bias_part, mask=inside)
    else:
        _parts_of_tiles(
            dy_ptr, input_ptr, mean_ptr, rstd_ptr, weight_parts_ptr, bias_parts_ptr, rows, dim, CENTRED, ROWS, BLOCK_DIM
        )  # fmt: skip


@triton.jit
def norm_sum_parts(parts_ptr, total_ptr, num_parts, dim, BLOCK_PARTS: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Columns program_id(0) * BLOCK_DIM and on: the sum of all parts, BLOCK_PARTS of them at a time, in order."""
    columns = tl.program_id(0) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    total = tl.zeros((BLOCK_DIM,), dtype=tl.float32)
    for first in range(0, num_parts, BLOCK_PARTS):
        parts = first + tl.arange(0, BLOCK_PARTS)
        inside = (parts[:, None] < num_parts) & (columns[None, :] < dim)
        offsets = parts[:, None].to(tl.int64) * dim + columns[None, :]
        total += tl.sum(tl.load(parts_ptr + offsets, mask=inside, other=0.0), axis=0)
    tl.store(total_ptr + columns, total.to(total_ptr.dtype.element_ty), mask=columns < dim)


def num_warps(block_dim: int) -> int:
    """Warps for a tile of `block_dim` columns: 8 numbers a thread, 1 to 32 warps."""
    return min(32, max(1, block_dim // 256))


def block_dim(dim: int) -> int:
    """Columns of a tile for rows of `dim`: all of them, or as many as fit."""
    return min(MAX_BLOCK_DIM, triton.next_power_of_2(dim))


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum (x itself without a residual), y, the mean (empty without a bias) and rstd, of x[..., D]."""
    x, weight = x.contiguous(), weight.contiguous()
    dim = weight.numel()
    rows, block = x.numel() // dim, block_dim(dim)
    y, total = torch.empty_like(x), x if residual is None else torch.empty_like(x)
    rstd = x.new_empty(rows, dtype=torch.float32)
    mean = x.new_empty(0 if bias is None else rows, dtype=torch.float32)
    residual, shift = x if residual is None else residual.contiguous(), weight if bias is None else bias.contiguous()
    if rows > 0:
        norm_forward[(rows,)](
            *(x, residual, weight, shift, total, y, mean if bias is not None else rstd, rstd, dim, eps),
            CENTRED=bias is not None,
            ADDS=total is not x,
            ONE_TILE=dim <= block,
            BLOCK_DIM=block,
            num_warps=num_warps(block),
        )
    return total, y, mean, rstd


def backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dx, the weight's gradient, and the bias's (None without a mean), of the normalised x[..., D]."""
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    dim = weight.numel()
    rows, block = x.numel() // dim, block_dim(dim)
    num_parts = triton.cdiv(rows, ROWS_PER_PROGRAM)
    dx = torch.empty_like(x)
    weight_parts = x.new_empty(num_parts, dim, dtype=torch.float32)
    bias_parts = weight_parts if mean is None else torch.empty_like(weight_parts)
    if rows > 0:
        norm_backward[(num_parts,)](
            *(dy, dy if dsum is None else dsum.contiguous(), x, weight, rstd if mean is None else mean, rstd),
            *(dx, weight_parts, bias_parts, rows, dim),
            CENTRED=mean is not None,
            ADDS=dsum is not None,
            ONE_TILE=dim <= block,
            ROWS=ROWS_PER_PROGRAM,
            BLOCK_DIM=block,
            num_warps=num_warps(block),
        )
    return dx, _sum(weight_parts, weight), None if mean is None else _sum(bias_parts, weight)


def _sum(parts: Tensor, like: Tensor) -> Tensor:
    total, (num_parts, dim) = torch.empty_like(like), parts.shape
    norm_sum_parts[(triton.cdiv(dim, 64),)](parts, total, num_parts, dim, BLOCK_PARTS=32, BLOCK_DIM=64)
    return total


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _, y, _, rstd = forward(x, None, weight, None, eps)
    return y, rstd


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total, y, _, rstd = forward(x, residual, weight, None, eps)
    return total, y, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return backward(dy, None, x, weight, None, rstd)[:2]


def add_rms_norm_backward(
    dy: Tensor, dsum: Tensor, total: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    return backward(dy, dsum, total, weight, None, rstd)[:2]
