"""Sums of squares over blocks of 256 numbers: what a gradient norm is made of.

Each sum is one fixed tree of float64 additions (halves are added until one number is left), so its bits depend on the
block's numbers alone: not on what surrounds the block, on threads, or on the implementation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lite.ops import dispatch, native

BLOCK = 256
# Numbers worked on at once by the reference: on a CPU a float64 copy of them stays in cache, on a GPU a launch pays.
_CHUNK, _DEVICE_CHUNK = 1 << 17, 1 << 26


def block_squares(values: Tensor) -> Tensor:
    """``[n * 256]``, any float dtype, to float64 ``[n]``."""
    assert values.numel() % BLOCK == 0, f"{values.numel()} numbers are no whole blocks of {BLOCK}"
    if dispatch.select("block_squares", "auto", values.dtype, values.device.type).backend == "cpu":
        return torch.ops.megatron_lite.block_squares_cpu(values)
    return block_squares_reference(values)


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


def _forward_cpu(values: Tensor) -> Tensor:
    return torch.ops.megatron_lite_cpu.block_squares(values)


def _fake(values: Tensor) -> Tensor:
    return values.new_empty(values.numel() // BLOCK, dtype=torch.float64)


native.define_operator("block_squares_cpu(Tensor values) -> Tensor", "CPU", _forward_cpu, _fake)
