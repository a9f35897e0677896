"""What benchmarks/kernel_cases/<op>.py hands to benchmarks/kernels.py: `cases(device="cpu") -> list[KernelCase]`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class KernelCase:
    """One op at one shape, and who computes it.

    A contender runs forward and backward once on tensors that exist already, on `device` as `cases` got it ('cpu' or
    'cuda'); it may return anything. The first is "ours", what backend="auto" runs; so are all whose name begins with
    'ours' ("ours, triton"), and the best of the rest is what the first is compared with. One of the rest that
    says when it is first called that it is not installed, or has no kernel for this, is "not here" in the table:
    PyTorch does not have every kernel on every device. Whatever else raises has failed, with its message.

    `bytes_moved` is what the op has to read and write at least, once each, forward and backward; `flops` is what it
    has to compute, 0 where memory alone counts. They are properties of the op, the same for every contender.
    """

    op: str
    label: str  # the shape, for a reader: '2048 x 4096'
    dtype: str  # 'fp32', 'bf16', 'fp16'
    contenders: Mapping[str, Callable[[], object]]
    bytes_moved: int
    flops: int = 0


def forward_backward(op: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> Callable[[], object]:
    """A contender: op(*inputs), and the gradients of those inputs that ask for one."""
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    d_outs: list[Tensor] = []  # made by the first call, which is not measured

    def run() -> object:
        result = op(*inputs)
        outs = result if isinstance(result, tuple) else (result,)
        if not d_outs:
            d_outs.extend(torch.randn_like(out) for out in outs)
        return torch.autograd.grad(outs, leaves, d_outs)

    return run


def compiled(reference: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of a reference, for the very shapes that it is called with."""
    return torch.compile(reference, dynamic=False)
