"""Softmax cross-entropy, forward and backward, at Llama's vocabularies."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_cases.case import KernelCase
from megatron_lite.ops.cross_entropy import cross_entropy

SHAPES = ((2048, 32_000), (4096, 128_256))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LARGEST_BYTES = {"cpu": 2 << 30, "cuda": 8 << 30}  # of the logits; a contender holds several of their size


def cases(device: str = "cpu") -> list[KernelCase]:
    found = []
    for tokens, vocabulary in SHAPES:
        for name, dtype in DTYPES.items():
            size = tokens * vocabulary * dtype.itemsize
            if size <= LARGEST_BYTES[device]:
                found.append(_case(tokens, vocabulary, name, dtype, device))
    return found


def _case(tokens: int, vocabulary: int, name: str, dtype: torch.dtype, device: str) -> KernelCase:
    made: list[tuple[Tensor, Tensor]] = []  # when the first contender runs: the cases together would fill the memory

    def run(op: Callable[[Tensor, Tensor], Tensor]) -> None:
        if not made:
            torch.manual_seed(0)
            logits = torch.randn(tokens, vocabulary, dtype=dtype, device=device)
            made.append((logits.requires_grad_(), torch.randint(vocabulary, (tokens,), device=device)))
        logits, targets = made[0]
        logits.grad = None
        op(logits, targets).backward()

    def plain(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, reduction="sum")

    compiled = torch.compile(plain)
    return KernelCase(
        op="cross_entropy",
        label=f"{tokens} x {vocabulary}",
        dtype=name,
        contenders={
            "ours": lambda: run(lambda logits, targets: cross_entropy(logits, targets, reduction="sum")),
            "F.cross_entropy": lambda: run(plain),
            "torch.compile": lambda: run(compiled),
        },
        bytes_moved=3 * tokens * vocabulary * dtype.itemsize,  # the logits read twice, their gradient written
    )
