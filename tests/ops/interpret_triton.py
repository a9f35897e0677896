"""Run by test_triton_kernels.py under TRITON_INTERPRET=1: prints how many negative controls were caught."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_lite._csrc.rms_norm import triton as kernels
from megatron_lite.ops.rms_norm import rms_norm_reference
from tests.ops.oracle import assert_within


def reference(convert: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
    leaves = [convert(x).requires_grad_(), convert(weight).requires_grad_()]
    out = rms_norm_reference(*leaves, 1e-5)
    return [out.detach(), *torch.autograd.grad(out, leaves, convert(dy))]


def check(rows: int, dim: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> int:
    """Checks y, dx and dweight; returns how many of the three, once made wrong by 16 units, were caught."""
    torch.manual_seed(dim)
    x, weight = torch.randn(rows, dim).to(dtype), (1 + 0.1 * torch.randn(dim)).to(weight_dtype)
    dy = torch.randn(rows, dim).to(dtype)
    y, rstd = kernels.forward(x, weight, 1e-5)
    dx, dweight = kernels.backward(dy, x, weight, rstd)
    plain, exact = reference(torch.clone, x, weight, dy), reference(Tensor.double, x, weight, dy)
    caught = 0
    for name, actual, p, e in zip(("y", "dx", "dweight"), (y, dx, dweight), plain, exact, strict=True):
        factor = 2.0 if name == "y" else 3.0
        assert_within(f"{name} {dtype} {rows}x{dim}", actual, p, e, factor)
        try:
            assert_within(name, actual * (1 + 16 * torch.finfo(dtype).eps), p, e, factor)
        except AssertionError:
            caught += 1
    return caught


if __name__ == "__main__":
    total = 0
    for dtype in (torch.float32, torch.float16):
        for rows, dim, weight_dtype in ((1, 40, dtype), (3, 59, dtype), (67, 111, dtype), (33, 128, torch.float32)):
            total += check(rows, dim, dtype, weight_dtype)
    print(total)
