"""What the tests of AdamW, of its kernels on the CPU and of those for a GPU, run on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_lite.ops.adamw import AdamWStep, adamw_reference

STEP = AdamWStep(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=3, factor=0.37)
FORMATS = (torch.float32, torch.bfloat16, torch.float16)
Memory = tuple[Tensor, Tensor, Tensor, Tensor]  # weights, first, second, gradients


def memory(size: int, gradient_dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Memory:
    """After some steps with gradients of very different sizes, and zero now and then."""
    generator = torch.Generator().manual_seed(size)
    draw = [torch.randn(size, generator=generator, device="cpu") for _ in range(4)]
    sizes = 10.0 ** torch.randint(-4, 2, (size,), generator=generator, device="cpu")
    gradients = (scale * sizes * draw[3] * (draw[3] > -1)).to(gradient_dtype)
    values = (draw[0], scale * sizes * draw[1], (scale * sizes * draw[2]).square(), gradients)
    device = torch.get_default_device()
    return tuple(value.to(device) for value in values)  # type: ignore[return-value]


def undecayed_in(size: int) -> list[tuple[int, int]]:
    """At the beginning, in the middle, at the end; on no boundary of a vector, and on one."""
    return [(0, size // 5), (size // 5 + size // 7, size // 2), (size - size // 9, size)]


def results(
    update: Callable[..., None],
    inputs: Memory,
    step: AdamWStep = STEP,
    parameter_dtype: torch.dtype | None = torch.bfloat16,
    undecayed: list[tuple[int, int]] | None = None,
) -> list[Tensor]:
    """weights, first, second, gradients and, where they have a dtype, parameters after update(...) of a copy."""
    copies = [tensor.clone() for tensor in inputs]
    size = inputs[0].numel()
    parameters = None if parameter_dtype is None else torch.full_like(inputs[0], 7.0, dtype=parameter_dtype)
    pairs = undecayed_in(size) if undecayed is None else undecayed
    update(*copies, step, undecayed=pairs, parameters=parameters)
    return copies + ([] if parameters is None else [parameters])


def expected(
    inputs: Memory, step: AdamWStep = STEP, parameter_dtype: torch.dtype | None = torch.bfloat16
) -> list[Tensor]:
    return results(adamw_reference, inputs, step, parameter_dtype)


def bits(tensor: Tensor) -> Tensor:
    """As integers, so that NaN equals itself and -0 is not 0."""
    return tensor.contiguous().view(torch.uint8)


def differing(actual: list[Tensor], wanted: list[Tensor]) -> int:
    """How many of the tensors differ in some bit."""
    assert len(actual) == len(wanted) > 0
    return sum(not torch.equal(bits(a), bits(w)) for a, w in zip(actual, wanted, strict=True))
