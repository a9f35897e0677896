"""The Triton kernel has the bits of the reference, in the interpreter too, which fuses nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_lite._csrc.adamw import triton as kernels
from megatron_lite.ops.adamw import AdamWStep, runs
from tests.ops import adamw_inputs as common
from tests.ops.triton_cases.case import POINTERS, Case, number_dtypes

SIZES = (1, 71, 2051)
DTYPES = number_dtypes()
NUM_CONTROLS = len(DTYPES) * len(SIZES) * 4  # weights, moments, parameters

COEFFICIENTS = ("factor", "mean_weight", "square_keep", "square_weight", "step_size", "eps", "decay")


def compile_cases() -> Iterator[Case]:
    for dtype, pointer in POINTERS.items():
        memory = dict.fromkeys(("weights_ptr", "first_ptr", "second_ptr"), "*fp32")
        types = {**memory, **dict.fromkeys(COEFFICIENTS, "fp32"), "size": "i32:16"}
        for writes in (False, True):
            constants = {"WRITES": writes, "BLOCK": kernels.BLOCK}
            name = f"gradient {dtype} {'with' if writes else 'without'} parameters"
            own = {**types, "gradients_ptr": pointer, "parameters_ptr": "*bf16" if writes else "*fp32"}
            yield Case(name, kernels.adamw_update, own, constants, kernels.NUM_WARPS)
        own = {**types, "gradients_ptr": "*fp32", "parameters_ptr": pointer, "size": "i32"}
        yield Case(f"parameters {dtype}", kernels.adamw_update, own, constants, kernels.NUM_WARPS)


def check_numbers() -> int:
    caught = 0
    for dtype in DTYPES:
        for size in SIZES:
            caught += _check(common.memory(size, dtype), dtype)
        _check(common.memory(71, dtype), None)
        _check(common.memory(0, dtype), dtype)
        for beta1 in (0.0, 0.3):
            _check(common.memory(71, dtype), dtype, dataclasses.replace(common.STEP, beta1=beta1))
    return caught


def _check(inputs: common.Memory, parameter_dtype: torch.dtype | None, step: AdamWStep = common.STEP) -> int:
    """Checks every bit; returns how many results an update with slightly other settings has wrong, as it should."""
    wanted = common.expected(inputs, step, parameter_dtype)
    assert common.differing(common.results(_kernel, inputs, step, parameter_dtype), wanted) == 0
    other = dataclasses.replace(step, lr=1.05 * step.lr, beta2=step.beta2 - 0.05, factor=step.factor + 0.05)
    return common.differing(common.results(_kernel, inputs, other, parameter_dtype), wanted)


def _kernel(*memory: Any, undecayed: Any, parameters: Tensor | None) -> None:
    *tensors, step = memory
    *coefficients, decay = step.coefficients()
    for where, decays in runs(tensors[0].numel(), undecayed):
        rounded = None if parameters is None else parameters[where]
        kernels.update(*(tensor[where] for tensor in tensors), rounded, *coefficients, decay if decays else 0.0)
