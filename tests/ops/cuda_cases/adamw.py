"""The CUDA kernels have the bits of the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_lite.ops.adamw import AdamWStep
from tests.ops import adamw_inputs as common

# Less than a pack, a pack and something, more than a block of threads, a whole number of packs and threads.
SIZES = (1, 3, 23, 2051, 4096)
NUM_CONTROLS = 3 * len(SIZES) * 4  # formats of the gradient; sizes; weights, moments, parameters


def check_numbers() -> int:
    caught = 0
    for gradient_dtype in common.FORMATS:
        for size in SIZES:
            caught += _check(common.memory(size, gradient_dtype))
        for parameter_dtype in (None, *common.FORMATS):
            _check(common.memory(71, gradient_dtype), parameter_dtype)
        # Memory that lies on no boundary of 16 bytes.
        _check(tuple(tensor[1:] for tensor in common.memory(2050, gradient_dtype)))
        _check(common.memory(0, gradient_dtype))
        for beta1 in (0.0, 0.3):
            _check(common.memory(71, gradient_dtype), step=dataclasses.replace(common.STEP, beta1=beta1))
    return caught


def _kernel(*memory: Tensor, undecayed: Any, parameters: Tensor | None, change: float = 0.0) -> None:
    *tensors, step = memory
    assert isinstance(step, AdamWStep)
    step = dataclasses.replace(step, lr=step.lr * (1 + change), beta2=step.beta2 - change, factor=step.factor + change)
    stream = torch.cuda.current_stream().cuda_stream if tensors[0].is_cuda else 0
    flat = [position for pair in undecayed for position in pair]
    torch.ops.megatron_lite_cuda.adamw(*tensors, parameters, flat, *step.coefficients(), stream)


def _check(inputs: Any, parameter_dtype: torch.dtype | None = torch.bfloat16, step: AdamWStep = common.STEP) -> int:
    """Checks every bit; returns how many results an update with slightly other settings has wrong, as it should."""
    wanted = common.expected(inputs, step, parameter_dtype)
    assert common.differing(common.results(_kernel, inputs, step, parameter_dtype), wanted) == 0
    wrong: Callable[..., None] = lambda *memory, **options: _kernel(*memory, **options, change=0.05)  # noqa: E731
    return common.differing(common.results(wrong, inputs, step, parameter_dtype), wanted)
