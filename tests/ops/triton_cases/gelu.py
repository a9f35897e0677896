from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_lite._csrc.gelu import triton as kernels
from megatron_lite.ops.gelu import gelu_reference
from tests.ops.oracle import assert_within
from tests.ops.triton_cases.case import POINTERS, Case, number_dtypes

COUNTS = (1, 59, 2049)
FORMS = {"gelu": "tanh", "gelu_erf": "none"}
NUM_CONTROLS = len(number_dtypes()) * len(COUNTS) * len(FORMS) * 2  # out and d_x


def compile_cases() -> Iterator[Case]:
    for dtype, pointer in POINTERS.items():
        types = dict.fromkeys(("x_ptr", "out_ptr", "d_out_ptr", "d_x_ptr"), pointer) | {"count": "i32:16"}
        for activation in FORMS:
            constants = {"ACTIVATION": activation, "BLOCK": kernels.BLOCK}
            for kernel in (kernels.gelu_forward, kernels.gelu_backward):
                name = f"{kernel.__name__} {dtype} {activation}"
                yield Case(name, kernel, types, constants, kernels.NUM_WARPS)


def check_numbers() -> int:
    assert kernels.forward(torch.empty(0), "gelu").shape == (0,)
    return sum(
        _check(count, dtype, activation) for dtype in number_dtypes() for count in COUNTS for activation in FORMS
    )


def _results(x: Tensor, d_out: Tensor, activation: str) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    out = gelu_reference(leaf, FORMS[activation])
    return [out.detach(), *torch.autograd.grad(out, leaf, d_out)]


def _check(count: int, dtype: torch.dtype, activation: str) -> int:
    """Checks out and d_x; returns how many of them, once made wrong by 32 units, were caught."""
    torch.manual_seed(count)
    x, d_out = (2 + 3 * torch.randn(count)).to(dtype), 1 + torch.rand(count).to(dtype)
    results = kernels.forward(x, activation), kernels.backward(d_out, x, activation)
    plain, exact = (_results(x.to(t), d_out.to(t), activation) for t in (dtype, torch.float64))
    caught = 0
    for name, actual, p, e in zip(("out", "d_x"), results, plain, exact, strict=True):
        factor = 2.0 if name == "out" else 3.0
        assert_within(f"{name} {activation} {dtype} {count}", actual, p, e, factor)
        try:
            assert_within(name, actual * (1 + 32 * torch.finfo(dtype).eps), p, e, factor)
        except AssertionError:
            caught += 1
    return caught
