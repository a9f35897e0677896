"""The output projection and cross-entropy, forward and backward, at Llama's vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_cases.case import KernelCase
from megatron_lite.ops.linear_cross_entropy import linear_cross_entropy

TOKENS, VOCABULARY = 2048, 32_000
HIDDEN = {"cpu": 512, "cuda": 4096}  # on a CPU the products of a wider model would hide all else
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def cases(device: str = "cpu") -> list[KernelCase]:
    return [_case(HIDDEN[device], name, dtype, device) for name, dtype in DTYPES.items()]


def _case(hidden: int, name: str, dtype: torch.dtype, device: str) -> KernelCase:
    torch.manual_seed(0)
    x = torch.randn(TOKENS, hidden, dtype=dtype, device=device).requires_grad_()
    weight = (torch.randn(VOCABULARY, hidden, device=device) * hidden**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (TOKENS,), device=device)

    def run(op: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        x.grad = weight.grad = None
        op(x, weight, targets).backward()

    def plain(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), targets, reduction="sum")

    compiled = torch.compile(plain)
    return KernelCase(
        op="linear_cross_entropy",
        label=f"{TOKENS} x {hidden} x {VOCABULARY}",
        dtype=name,
        contenders={
            "ours": lambda: run(linear_cross_entropy),
            "F.linear + F.cross_entropy": lambda: run(plain),
            "torch.compile": lambda: run(compiled),
        },
        bytes_moved=2 * (2 * TOKENS * hidden + 2 * VOCABULARY * hidden) * dtype.itemsize,  # x, weight, their gradients
        flops=3 * 2 * TOKENS * hidden * VOCABULARY,
    )
