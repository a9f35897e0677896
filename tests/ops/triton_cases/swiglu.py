from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from megatron_lite._csrc.swiglu import triton as kernels
from megatron_lite.ops.activation_kernels import ACTIVATIONS
from megatron_lite.ops.swiglu import swiglu_reference
from tests.ops import activation_checks
from tests.ops.triton_cases import activation_cases
from tests.ops.triton_cases.case import Case, number_dtypes

SHAPES = ((1, 40), (3, 59), (2, 1100))
NUM_CONTROLS = len(number_dtypes()) * len(SHAPES) * len(ACTIVATIONS) * activation_checks.NUM_CONTROLS


def compile_cases() -> Iterator[Case]:
    pointers = ("gate_up_ptr", "out_ptr", "d_out_ptr", "d_gate_up_ptr")
    functions = kernels.swiglu_forward, kernels.swiglu_backward
    return activation_cases.compile_cases(kernels, functions, pointers, "half", ACTIVATIONS)


def check_numbers() -> int:
    assert kernels.forward(torch.empty(0, 8), "silu").shape == (0, 4)
    return sum(
        _check(rows, half, dtype, activation)
        for dtype in number_dtypes()
        for rows, half in SHAPES
        for activation in ACTIVATIONS
    )


def _check(rows: int, half: int, dtype: torch.dtype, activation: str) -> int:
    torch.manual_seed(half)
    gate_up, d_out = (3 * torch.randn(rows, 2 * half)).to(dtype), torch.randn(rows, half).to(dtype)
    gate_up[0, 0], gate_up[-1, 1] = 30.0, -30.0
    reference = partial(swiglu_reference, activation=activation)
    return activation_checks.check(
        activation, activation_cases.kernel_of(kernels, activation), reference, gate_up, d_out
    )
