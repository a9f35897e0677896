from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_lite._csrc.swiglu import triton as kernels
from megatron_lite.ops.swiglu import ACTIVATIONS, swiglu_reference
from tests.ops.oracle import assert_within
from tests.ops.triton_cases.case import POINTERS, Case, number_dtypes

SHAPES = ((1, 40), (3, 59), (2, 1100))
NUM_CONTROLS = len(number_dtypes()) * len(SHAPES) * len(ACTIVATIONS) * 2  # out and d_gate_up


def compile_cases() -> Iterator[Case]:
    for dtype, pointer in POINTERS.items():
        types = dict.fromkeys(("gate_up_ptr", "out_ptr", "d_out_ptr", "d_gate_up_ptr"), pointer) | {"half": "i32:16"}
        for activation in ACTIVATIONS:
            constants = {"ACTIVATION": activation, "BLOCK": kernels.BLOCK}
            for kernel in (kernels.swiglu_forward, kernels.swiglu_backward):
                name = f"{kernel.__name__} {dtype} {activation}"
                yield Case(name, kernel, types, constants, kernels.NUM_WARPS)


def check_numbers() -> int:
    assert kernels.forward(torch.empty(0, 8), "silu").shape == (0, 4)
    return sum(
        _check(rows, half, dtype, activation)
        for dtype in number_dtypes()
        for rows, half in SHAPES
        for activation in ACTIVATIONS
    )


def _results(gate_up: Tensor, d_out: Tensor, activation: str) -> list[Tensor]:
    leaf = gate_up.clone().requires_grad_()
    out = swiglu_reference(leaf, activation)
    return [out.detach(), *torch.autograd.grad(out, leaf, d_out)]


def _check(rows: int, half: int, dtype: torch.dtype, activation: str) -> int:
    """Checks out and d_gate_up; returns how many of them, once made wrong by 16 units, were caught."""
    torch.manual_seed(half)
    gate_up, d_out = (3 * torch.randn(rows, 2 * half)).to(dtype), torch.randn(rows, half).to(dtype)
    gate_up[0, 0], gate_up[-1, 1] = 30.0, -30.0
    results = kernels.forward(gate_up, activation), kernels.backward(d_out, gate_up, activation)
    plain, exact = (_results(gate_up.to(t), d_out.to(t), activation) for t in (dtype, torch.float64))
    caught = 0
    for name, actual, p, e in zip(("out", "d_gate_up"), results, plain, exact, strict=True):
        factor = 2.0 if name == "out" else 3.0
        assert_within(f"{name} {activation} {dtype} {rows}x{half}", actual, p, e, factor)
        try:
            assert_within(name, actual * (1 + 32 * torch.finfo(dtype).eps), p, e, factor)
        except AssertionError:
            caught += 1
    return caught
