from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from megatron_lite._csrc.gelu import triton as kernels
from megatron_lite.ops.gelu import gelu_reference
from tests.ops import activation_checks
from tests.ops.triton_cases import activation_cases
from tests.ops.triton_cases.case import Case, number_dtypes

COUNTS = (1, 59, 2049)
FORMS = {"gelu": "tanh", "gelu_erf": "none"}
NUM_CONTROLS = len(number_dtypes()) * len(COUNTS) * len(FORMS) * activation_checks.NUM_CONTROLS


def compile_cases() -> Iterator[Case]:
    functions, pointers = (kernels.gelu_forward, kernels.gelu_backward), ("x_ptr", "out_ptr", "d_out_ptr", "d_x_ptr")
    return activation_cases.compile_cases(kernels, functions, pointers, "count", FORMS)


def check_numbers() -> int:
    assert kernels.forward(torch.empty(0), "gelu").shape == (0,)
    return sum(
        _check(count, dtype, activation) for dtype in number_dtypes() for count in COUNTS for activation in FORMS
    )


def _check(count: int, dtype: torch.dtype, activation: str) -> int:
    torch.manual_seed(count)
    x, d_out = (2 + 3 * torch.randn(count)).to(dtype), 1 + torch.rand(count).to(dtype)
    reference = partial(gelu_reference, approximate=FORMS[activation])
    return activation_checks.check(activation, activation_cases.kernel_of(kernels, activation), reference, x, d_out)
