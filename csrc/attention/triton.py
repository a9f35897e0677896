"""Attention in Triton, forward and backward, for GPUs of compute capability 8.0 and up.

The equations and the meaning of the arguments are in megatron_lite/ops/attention_kernels.py. No S x S tensor exists:
the forward keeps the log-sum-exp of each row, the backward computes the scores again, once for dk and dv and once for
dq. Each result is summed in one program in a fixed order, so the backward is always deterministic. Arithmetic is fp32
but for the operands of the tensor cores, which have the dtype of the inputs; with fp32 they are not used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from megatron_lite._csrc.attention.triton_backward import (
    attention_backward_keys,
    attention_backward_queries,
    attention_backward_rows,
)
from megatron_lite._csrc.attention.triton_forward import attention_forward

LOG2_E = 1.4426950408889634
MAX_DIM = 256  # above it no two tiles fit a thread block's registers
MAX_ROW_STRIDE = 2**23  # offsets inside a tile of up to 128 rows are 32 bits wide


# Registers and bytes of shared memory, the most of all configurations below. Block sizes of 16-bit inputs keep within
# the 99 KiB that sm_86, sm_89 and sm_120 give a block (sm_80 gives 163), and within 227 KiB on sm_90 and sm_100.
CEILINGS = {
    "attention_forward": (255, 163840),
    "attention_backward_rows": (168, 256),
    "attention_backward_keys": (255, 98820),
    "attention_backward_queries": (255, 196608),
}


@dataclass(frozen=True)
class Tiles:
    """Queries and keys of a block, warps of a program, stages of the pipeline of loads."""

    queries: int
    keys: int
    warps: int
    stages: int


# Large blocks that take no spills and fit the shared memory when compiled. No GPU has measured them yet.
# Kernel -> head dim -> blocks.
_FP32_TILES = {
    "forward": {64: Tiles(64, 32, 8, 2), 128: Tiles(32, 16, 4, 2), 256: Tiles(16, 16, 8, 2)},
    "backward_keys": {64: Tiles(32, 32, 8, 2), 128: Tiles(16, 16, 8, 2), 256: Tiles(16, 16, 8, 2)},
    "backward_queries": {64: Tiles(32, 32, 4, 2), 128: Tiles(32, 16, 4, 2), 256: Tiles(16, 16, 8, 2)},
}
_SM80_TILES = {
    "forward": {64: Tiles(128, 64, 4, 3), 128: Tiles(64, 64, 4, 2), 256: Tiles(64, 32, 8, 2)},
    "backward_keys": {64: Tiles(64, 128, 8, 3), 128: Tiles(64, 64, 8, 2), 256: Tiles(32, 32, 8, 2)},
    "backward_queries": {64: Tiles(128, 64, 8, 2), 128: Tiles(128, 32, 8, 2), 256: Tiles(64, 16, 8, 2)},
}
_SM90_TILES = {
    "forward": {64: Tiles(128, 64, 4, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(128, 32, 8, 3)},
    "backward_keys": {64: Tiles(64, 128, 8, 3), 128: Tiles(32, 128, 8, 2), 256: Tiles(32, 32, 8, 2)},
    "backward_queries": {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(128, 32, 8, 2)},
}


def tiles(kernel: str, dim: int, itemsize: int, sm: int) -> Tiles:
    """The blocks of `kernel` for heads of `dim` numbers of `itemsize` bytes on compute capability `sm` / 10."""
    has_227_kib = sm // 10 in (9, 10)
    table = _FP32_TILES if itemsize == 4 else _SM90_TILES if has_227_kib else _SM80_TILES
    # The masks of heads that do not fill their tile take registers: these heads have the blocks of the next size.
    return table[kernel][min(max(padded(dim) * (1 if dim == padded(dim) else 2), 64), 256)]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
) -> tuple[Tensor, Tensor]:
    """q[B, Sq, H, D], k, v[B, Sk, Hk, D] -> (out[B, Sq, H, D] in q's dtype, lse fp32[B, H, Sq])."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    batch, num_queries, heads, dim = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty(batch, heads, num_queries, dtype=torch.float32)
    block_dim = padded(dim)
    choice = tiles("forward", dim, q.element_size(), _capability(q))
    grid = triton.cdiv(num_queries, choice.queries) * batch * heads
    if grid > 0:
        attention_forward[(grid,)](
            *(q, k, v, *_optional(q, bounds, slopes), out, lse, *_strides(q, k, v)),
            *(num_queries, k.shape[1], heads, heads // k.shape[2], dim),
            *(*_reach(num_queries, k.shape[1], causal, window), scale * LOG2_E),
            BLOCK_QUERIES=choice.queries,
            BLOCK_KEYS=choice.keys,
            BLOCK_DIM=block_dim,
            EVEN_DIM=dim == block_dim,
            HAS_BOUNDS=bounds is not None,
            HAS_SLOPES=slopes is not None,
            num_warps=choice.warps,
            num_stages=choice.stages,
        )
    return out, lse


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    d_lse: Tensor | None,
    bounds: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv), contiguous, for d_out[B, Sq, H, D] and d_lse[B, H, Sq], always deterministic."""
    q, k, v, out, d_out = _rows(q), _rows(k), _rows(v), _rows(out), _rows(d_out)
    batch, num_queries, heads, dim = q.shape
    num_keys, key_heads = k.shape[1:3]
    block_dim, sm = padded(dim), _capability(q)
    bounds_or_q, slopes_or_q = _optional(q, bounds, slopes)
    constants = {"BLOCK_DIM": block_dim, "EVEN_DIM": dim == block_dim}
    by_keys = tiles("backward_keys", dim, q.element_size(), sm)
    by_queries = tiles("backward_queries", dim, q.element_size(), sm)
    base, delta = q.new_empty(2, batch, heads, num_queries, dtype=torch.float32)
    first, stop = q.new_empty(2, batch, num_queries, dtype=torch.int32)
    num_blocks = triton.cdiv(num_queries, by_keys.queries)
    ranges = q.new_empty(batch, num_blocks, 4, dtype=torch.int32)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if dq.numel() > 0:
        attention_backward_rows[(num_blocks * batch * heads,)](
            *(d_out, out, lse.contiguous(), q if d_lse is None else d_lse.contiguous(), bounds_or_q),
            *(base, delta, first, stop, ranges, *_strides(d_out, out), num_queries, num_keys, heads, dim),
            *_reach(num_queries, num_keys, causal, window),
            BLOCK_QUERIES=by_keys.queries,
            HAS_BOUNDS=bounds is not None,
            HAS_D_LSE=d_lse is not None,
            **constants,
        )
    sizes = (num_queries, num_keys, heads, heads // key_heads, dim, scale * LOG2_E)
    strides = _strides(q, k, v, d_out)
    if dk.numel() > 0:
        attention_backward_keys[(triton.cdiv(num_keys, by_keys.keys) * batch * key_heads,)](
            *(q, k, v, d_out, base, delta, first, stop, slopes_or_q, ranges, dk, dv, *strides, *sizes),
            BLOCK_QUERIES=by_keys.queries,
            BLOCK_KEYS=by_keys.keys,
            HAS_SLOPES=slopes is not None,
            **constants,
            num_warps=by_keys.warps,
            num_stages=by_keys.stages,
        )
    if dq.numel() > 0:
        attention_backward_queries[(triton.cdiv(num_queries, by_queries.queries) * batch * heads,)](
            *(q, k, v, d_out, base, delta, first, stop, slopes_or_q, dq, *strides, *sizes),
            BLOCK_QUERIES=by_queries.queries,
            BLOCK_KEYS=by_queries.keys,
            HAS_SLOPES=slopes is not None,
            **constants,
            num_warps=by_queries.warps,
            num_stages=by_queries.stages,
        )
    return dq, dk, dv


def _rows(x: Tensor) -> Tensor:
    """x, or a contiguous copy of it where a row's numbers do not lie side by side, or rows lie too far apart."""
    return x if x.stride(3) == 1 and x.stride(1) <= MAX_ROW_STRIDE else x.contiguous()


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in (x.stride(0), x.stride(1), x.stride(2)))


def _optional(q: Tensor, bounds: Tensor | None, slopes: Tensor | None) -> tuple[Tensor, Tensor]:
    """What is passed where there are no bounds or slopes is a tensor that the kernel does not read."""
    return q if bounds is None else bounds.contiguous(), q if slopes is None else slopes.contiguous()


def _reach(num_queries: int, num_keys: int, causal: bool, window: int) -> tuple[int, int]:
    """How many keys before its position and after it a query may see."""
    everything = num_queries + num_keys
    return window - 1 if window > 0 else everything, 0 if causal else everything


def padded(dim: int) -> int:
    """The columns of a tile for heads of `dim` numbers."""
    if dim > MAX_DIM:
        raise ValueError(
            f"the Triton attention takes heads of up to {MAX_DIM} numbers, not {dim}; use sdpa or reference"
        )
    return max(16, triton.next_power_of_2(dim))


def _capability(x: Tensor) -> int:
    """10 times the compute capability of x's device; in the interpreter, which has none, the least."""
    if not x.is_cuda:
        return 80
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor
