"""Sums of squares over blocks of 256 numbers: what a gradient norm is made of.

Each sum is one fixed tree of float64 additions (halves are added until one number is left), so its bits depend on the
block's numbers alone: not on what surrounds the block, on threads, or on the implementation. A square of a number in
fp32 or less, and a sum of 256 of them, is finite in float64: a sum that is infinite or not a number says that one of
the numbers was, so the norm is the check for overflow as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lite.ops import dispatch, native
from megatron_lite.ops.checks import require, require_float

BLOCK = 256
# Numbers worked on at once by the reference: on a CPU a float64 copy of them stays in cache, on a GPU a launch pays.
_CHUNK, _DEVICE_CHUNK = 1 << 17, 1 << 26


def block_squares(values: Tensor, backend: str = "auto") -> Tensor:
    """``[n * 256]``, any float dtype, to float64 ``[n]``. Raises ValueError for other shapes and dtypes, and for a
    backend (auto, reference, cpu, triton, cuda) that cannot run."""
    require_float("block_squares", "values", values)
    is_whole = values.dim() == 1 and values.numel() % BLOCK == 0
    require(is_whole, "block_squares", "values", values, f"[n * {BLOCK}], whole blocks")
    choice = dispatch.select("block_squares", backend, values.dtype, values.device.type).backend
    if choice == "reference":
        return block_squares_reference(values)
    return getattr(torch.ops.megatron_lite, f"block_squares_{choice}")(values.contiguous())


def block_squares_reference(values: Tensor) -> Tensor:
    """The specification of ``block_squares``, in plain torch."""
    sums = [values.new_empty(0, dtype=torch.float64)]
    for chunk in values.split(_CHUNK if values.device.type == "cpu" else _DEVICE_CHUNK):
        squares = chunk.to(torch.float64, copy=True).square_().view(-1, BLOCK)
        while squares.shape[1] > 1:
            half = squares.shape[1] // 2
            squares = squares[:, :half] + squares[:, half:]
        sums.append(squares[:, 0])
    return torch.cat(sums)


def _cpu(values: Tensor) -> Tensor:
    return torch.ops.megatron_lite_cpu.block_squares(values)


def _cuda(values: Tensor) -> Tensor:
    return native.run_cuda("block_squares", values)


def _triton(values: Tensor) -> Tensor:
    return native.run_triton("block_squares", "sums", values)


def _fake(values: Tensor) -> Tensor:
    return values.new_empty(values.numel() // BLOCK, dtype=torch.float64)


native.define_operator("block_squares_cpu(Tensor values) -> Tensor", "CPU", _cpu, _fake)
native.define_operator("block_squares_cuda(Tensor values) -> Tensor", "CUDA", _cuda, _fake)
native.define_operator("block_squares_triton(Tensor values) -> Tensor", "CUDA", _triton, _fake)
