"""What every kernel of SwiGLU and GELU is held to, given as the two functions of one activation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.ops.oracle import count_caught

Kernel = Callable[[Tensor, Tensor], Sequence[Tensor]]
NUM_CONTROLS = 2  # out and the gradient


def check(name: str, kernel: Kernel, reference: Callable[[Tensor], Tensor], x: Tensor, d_out: Tensor) -> int:
    """Checks what kernel(x, d_out) returns, out and the gradient of x; returns how many of the two, once made wrong by
    32 units, were caught."""
    plain, exact = (_results(reference, x.to(t), d_out.to(t)) for t in (x.dtype, torch.float64))
    name = f"{name} {x.dtype} {tuple(x.shape)}"
    return count_caught(name, kernel(x, d_out), plain, exact, 1, 32 * torch.finfo(x.dtype).eps)


def _results(reference: Callable[[Tensor], Tensor], x: Tensor, d_out: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    out = reference(leaf)
    return [out.detach(), *torch.autograd.grad(out, leaf, d_out)]


def raw_kernel(operators: object, op: str, number: int, last: int) -> Kernel:
    """The raw operators `op` and `op`_backward of the activation of that number; `last` is a stream, or an
    instruction set."""

    def run(x: Tensor, d_out: Tensor) -> Sequence[Tensor]:
        return getattr(operators, op)(x, number, last), getattr(operators, f"{op}_backward")(d_out, x, number, last)

    return run
