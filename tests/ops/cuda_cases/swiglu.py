from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from megatron_lite.ops.activation_kernels import ACTIVATIONS
from megatron_lite.ops.swiglu import swiglu_reference
from tests.ops import activation_checks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows of packs, of single numbers, and of more columns than a block's.
SHAPES = ((3, 40), (2, 59), (2, 2304))
# One more shape, misaligned.
NUM_CONTROLS = len(DTYPES) * (len(SHAPES) + 1) * len(ACTIVATIONS) * activation_checks.NUM_CONTROLS


def check_numbers() -> int:
    caught = 0
    for dtype in DTYPES:
        torch.manual_seed(0)
        inputs = [(3 * torch.randn(rows, 2 * half)).to(dtype) for rows, half in SHAPES]
        inputs.append((3 * torch.randn(2 * 80 + 1)).to(dtype)[1:].view(2, 80))
        for activation in ACTIVATIONS:
            caught += sum(_check(gate_up, activation) for gate_up in inputs)
            _check_edges(dtype, activation)
    return caught


def _kernel(activation: str) -> activation_checks.Kernel:
    return activation_checks.raw_kernel(torch.ops.megatron_lite_cuda, "swiglu", ACTIVATIONS.index(activation), 0)


def _check(gate_up: Tensor, activation: str) -> int:
    d_out = torch.randn(gate_up.shape[0], gate_up.shape[1] // 2).to(gate_up.dtype)
    reference = partial(swiglu_reference, activation=activation)
    return activation_checks.check(activation, _kernel(activation), reference, gate_up, d_out)


def _check_edges(dtype: torch.dtype, activation: str) -> None:
    """No rows, large values, NaN."""
    kernel = _kernel(activation)
    empty = torch.empty(0, 16, dtype=dtype)
    assert [t.shape for t in kernel(empty, empty[:, :8])] == [(0, 8), (0, 16)]
    gate_up = torch.ones(1, 16, dtype=dtype)
    gate_up[0, :4] = torch.tensor([1e4, -1e4, 30.0, -200.0], dtype=dtype)
    ones = torch.ones(1, 8, dtype=dtype)
    assert all(torch.isfinite(t).all() for t in kernel(gate_up, ones))
    gate_up[0, 5] = torch.nan
    assert kernel(gate_up, ones)[0].isnan().nonzero().tolist() == [[0, 5]]
