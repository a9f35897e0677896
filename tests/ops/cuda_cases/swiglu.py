from __future__ import annotations

import torch
from torch import Tensor

from megatron_lite.ops.swiglu import ACTIVATIONS, swiglu_reference
from tests.ops.oracle import assert_within

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows of packs, of single numbers, and of more columns than a block's.
SHAPES = ((3, 40), (2, 59), (2, 2304))
NUM_CONTROLS = len(DTYPES) * (len(SHAPES) + 1) * len(ACTIVATIONS) * 2  # one more shape, misaligned; out and d_gate_up


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


def _kernel(gate_up: Tensor, d_out: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    number, operators = ACTIVATIONS.index(activation), torch.ops.megatron_lite_cuda
    return operators.swiglu(gate_up, number, 0), operators.swiglu_backward(d_out, gate_up, number, 0)


def _results(gate_up: Tensor, d_out: Tensor, activation: str) -> list[Tensor]:
    leaf = gate_up.clone().requires_grad_()
    out = swiglu_reference(leaf, activation)
    return [out.detach(), *torch.autograd.grad(out, leaf, d_out)]


def _check(gate_up: Tensor, activation: str) -> int:
    """Checks out and d_gate_up; returns how many of them, once made wrong by 32 units, were caught."""
    dtype, d_out = gate_up.dtype, torch.randn(gate_up.shape[0], gate_up.shape[1] // 2).to(gate_up.dtype)
    results = _kernel(gate_up, d_out, activation)
    plain, exact = (_results(gate_up.to(t), d_out.to(t), activation) for t in (dtype, torch.float64))
    caught = 0
    for name, actual, p, e in zip(("out", "d_gate_up"), results, plain, exact, strict=True):
        factor = 2.0 if name == "out" else 3.0
        assert_within(f"{name} {activation} {dtype} {tuple(gate_up.shape)}", actual, p, e, factor)
        try:
            assert_within(name, actual * (1 + 32 * torch.finfo(dtype).eps), p, e, factor)
        except AssertionError:
            caught += 1
    return caught


def _check_edges(dtype: torch.dtype, activation: str) -> None:
    """No rows, large values, NaN."""
    empty = torch.empty(0, 16, dtype=dtype)
    assert [t.shape for t in _kernel(empty, empty[:, :8], activation)] == [(0, 8), (0, 16)]
    gate_up = torch.ones(1, 16, dtype=dtype)
    gate_up[0, :4] = torch.tensor([1e4, -1e4, 30.0, -200.0], dtype=dtype)
    ones = torch.ones(1, 8, dtype=dtype)
    assert all(torch.isfinite(t).all() for t in _kernel(gate_up, ones, activation))
    gate_up[0, 5] = torch.nan
    assert _kernel(gate_up, ones, activation)[0].isnan().nonzero().tolist() == [[0, 5]]
