"""Cross-entropy over a shard of a vocabulary in Triton, for GPUs of compute capability 8.0 and up; see cpu.cpp for the
equations.

A program takes a row and goes over it in blocks of columns, once in each kernel. In the statistics each column of the
block has a maximum and a sum of its own, which are put together at the end of the row. Arithmetic is fp32 whatever the
storage format.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOWEST = tl.constexpr(-3.40282347e38)  # as a maximum of nothing: below every logit, and its differences are no NaN
MAX_BLOCK = 4096
# Kernel -> registers, bytes of shared memory at most.
CEILINGS = {"cross_entropy_statistics": (80, 128), "cross_entropy_gradient": (48, 0)}


@triton.jit
def cross_entropy_statistics(
    logits_ptr, targets_ptr, statistics_ptr, rows, stride, start, size, ignored, BLOCK: tl.constexpr
):
    """Row program_id(0) of statistics[4, rows]: m, sum of exp(x - m), the target's logit, sum of x."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    is_ignored = target == ignored
    count = tl.where(is_ignored, 0, size)
    x_ptr = logits_ptr + row * stride
    maximum = tl.full((BLOCK,), LOWEST, tl.float32)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    totals = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, count, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < count
        x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        highest = tl.maximum(maximum, tl.where(inside, x, LOWEST))
        sums = sums * tl.exp(maximum - highest) + tl.where(inside, tl.exp(x - highest), 0.0)
        totals += x
        maximum = highest
    highest = tl.max(maximum, axis=0)
    total_sum = tl.sum(sums * tl.exp(maximum - highest), axis=0)
    column = target - start
    is_here = (column >= 0) & (column < count)
    picked = tl.load(x_ptr + tl.where(is_here, column, 0), mask=is_here, other=float("-inf")).to(tl.float32)
    tl.store(statistics_ptr + row, tl.where(is_ignored, 0.0, highest))
    tl.store(statistics_ptr + rows + row, tl.where(is_ignored, 1.0, total_sum))
    tl.store(statistics_ptr + 2 * rows + row, tl.where(is_ignored, 0.0, picked))
    tl.store(statistics_ptr + 3 * rows + row, tl.sum(totals, axis=0))


@triton.jit
def cross_entropy_gradient(
    logits_ptr,
    targets_ptr,
    maxima_ptr,
    sums_ptr,
    upstream_ptr,
    gradient_ptr,
    stride,
    start,
    size,
    ignored,
    label_smoothing,
    uniform,
    z_loss,
    BLOCK: tl.constexpr,
):
    """Row program_id(0) of the gradient, which may lie over the logits."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    count = tl.where(target == ignored, 0, size)
    column = target - start
    maximum = tl.load(maxima_ptr + row)
    total = tl.load(sums_ptr + row)
    upstream = tl.load(upstream_ptr + row)
    z_slope = 2.0 * z_loss * (maximum + tl.log(total))
    factor = upstream * (1.0 + z_slope) / total
    for first in range(0, stride, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < count
        x = tl.load(logits_ptr + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
        e = tl.exp(x - maximum)
        at_target = upstream * ((e / total - (1.0 - label_smoothing)) + e / total * z_slope)  # near 1 - 1
        slope = tl.where(columns == column, at_target, e * factor) - upstream * uniform
        slope = tl.where(inside, slope, 0.0).to(gradient_ptr.dtype.element_ty)
        tl.store(gradient_ptr + row * stride + columns, slope, mask=columns < stride)


def block_of(stride: int) -> int:
    """Columns that a program holds at a time, for rows of `stride` columns."""
    return min(MAX_BLOCK, max(128, triton.next_power_of_2(stride)))


def num_warps(block: int) -> int:
    """Warps for `block` columns: 8 numbers a thread, one 16-byte access of a 16-bit format."""
    return max(1, block // 256)


def statistics(logits: Tensor, targets: Tensor, start: int, size: int, ignored: int) -> Tensor:
    """Contiguous logits[T, W], targets[T] -> fp32 [4, T]: see `local_statistics` in ops/cross_entropy_shard.py."""
    rows, stride = logits.shape
    out = logits.new_empty(4, rows, dtype=torch.float32)
    block = block_of(stride)
    if rows > 0:
        cross_entropy_statistics[(rows,)](
            logits, targets, out, rows, stride, start, size, ignored, BLOCK=block, num_warps=num_warps(block)
        )
    return out


def gradient(
    logits: Tensor,
    targets: Tensor,
    maxima: Tensor,
    sums: Tensor,
    upstream: Tensor,
    ignored: int,
    start: int,
    size: int,
    vocab_size: int,
    label_smoothing: float,
    z_loss: float,
    out: Tensor,
) -> None:
    """Writes the gradient of contiguous logits[T, W] to `out`, which may be `logits`."""
    rows, stride = logits.shape
    block = block_of(stride)
    if rows > 0:
        cross_entropy_gradient[(rows,)](
            *(logits, targets, maxima, sums, upstream, out, stride, start, size, ignored),
            *(label_smoothing, label_smoothing / vocab_size, z_loss),
            BLOCK=block,
            num_warps=num_warps(block),
        )
