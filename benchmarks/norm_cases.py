"""What the cases of the two norms share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.kernel_cases.case import KernelCase

SHAPES = ((2048, 4096), (4096, 2048))  # tokens x hidden size
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EPS = 1e-5
Results = Tensor | tuple[Tensor, ...]


def norm_cases(
    op: str, contenders: dict[str, Callable[..., Results]], num_rows: int, num_parameters: int, device: str
) -> list[KernelCase]:
    """`num_rows` is 2 with an addition: (x, residual) and (sum, y); without it 1."""
    cases = []
    for rows, dim in SHAPES:
        for label, dtype in DTYPES.items():
            shapes = [(rows, dim)] * num_rows + [(dim,)] * num_parameters
            leaves = [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]
            upward = [torch.randn(rows, dim, device=device).to(dtype) for _ in range(num_rows)]
            runs = {name: _both_ways(function, leaves, upward) for name, function in contenders.items()}
            # Forward: x [and residual] in, y [and sum] out. Backward: the input and what comes from above in, dx out.
            moved = (2 * num_rows + 2 + num_rows) * rows * dim * dtype.itemsize
            cases.append(KernelCase(op, f"{rows} x {dim}", label, runs, moved))
    return cases


def _both_ways(
    function: Callable[..., Results], leaves: Sequence[Tensor], upward: Sequence[Tensor]
) -> Callable[[], object]:
    def run() -> object:
        return torch.autograd.grad(function(*leaves), leaves, upward)

    return run
