"""What the cases of SwiGLU and GELU share: two kernels that take an activation, forward and backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

from tests.ops.activation_checks import Kernel
from tests.ops.triton_cases.case import POINTERS, Case


def compile_cases(
    module: ModuleType, functions: Sequence[Any], pointers: Sequence[str], count: str, activations: Iterable[str]
) -> Iterator[Case]:
    """Each of `functions` of `module`, whose arguments are `pointers` and the integer `count`."""
    for dtype, pointer in POINTERS.items():
        types = dict.fromkeys(pointers, pointer) | {count: "i32:16"}
        for activation in activations:
            constants = {"ACTIVATION": activation, "BLOCK": module.BLOCK}
            for function in functions:
                name = f"{function.__name__} {dtype} {activation}"
                yield Case(name, function, types, constants, module.NUM_WARPS)


def kernel_of(module: ModuleType, activation: str) -> Kernel:
    """`forward` and `backward` of `module` for one activation."""

    def run(x: Tensor, d_out: Tensor) -> Sequence[Tensor]:
        return module.forward(x, activation), module.backward(d_out, x, activation)

    return run
