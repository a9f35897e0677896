"""What the cases of the two norms share: their kernels are the same, with a mean and a bias or without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from megatron_lite._csrc.rms_norm import triton as kernels
from megatron_lite.ops.layer_norm import layer_norm_reference
from megatron_lite.ops.rms_norm import rms_norm_reference
from tests.ops.oracle import count_caught
from tests.ops.triton_cases.case import POINTERS, Case, number_dtypes

EPS = 1e-5
SHAPES = ((1, 40), (3, 59), (67, 111), (33, 128), (2, kernels.MAX_BLOCK_DIM + 17))  # the last has two tiles


def num_controls(centred: bool) -> int:
    """For each dtype: alone y, dx and the gradients of parameters, with an addition the sum too."""
    return len(number_dtypes()) * len(SHAPES) * (2 * (4 if centred else 3) + 1)


def compile_cases(centred: bool) -> Iterator[Case]:
    arrays = ("x_ptr", "residual_ptr", "weight_ptr", "bias_ptr", "sum_ptr", "y_ptr", "dy_ptr", "dsum_ptr", "input_ptr")
    for dtype, pointer in POINTERS.items():
        types = dict.fromkeys((*arrays, "dx_ptr", "total_ptr"), pointer)
        types |= dict.fromkeys(("mean_ptr", "rstd_ptr", "parts_ptr", "weight_parts_ptr", "bias_parts_ptr"), "*fp32")
        types |= {"rows": "i32", "dim": "i32:16", "num_parts": "i32", "eps": "fp32"}
        for adds in (False, True):
            for block, one_tile in (
                (512, True),
                (4096, True),
                (kernels.MAX_BLOCK_DIM, True),
                (kernels.MAX_BLOCK_DIM, False),
            ):
                constants = {"CENTRED": centred, "ADDS": adds, "ONE_TILE": one_tile, "BLOCK_DIM": block}
                label, warps = f"{dtype} {block} {adds} {one_tile}", kernels.num_warps(block)
                yield Case(f"forward {label}", kernels.norm_forward, types, constants, warps)
                constants = {**constants, "ROWS": kernels.ROWS_PER_PROGRAM}
                yield Case(f"backward {label}", kernels.norm_backward, types, constants, warps)
        yield Case(f"sum_parts {dtype}", kernels.norm_sum_parts, types, {"BLOCK_PARTS": 32, "BLOCK_DIM": 64})


def check_numbers(module: ModuleType, norm: str) -> int:
    caught = 0
    for dtype in number_dtypes():
        for i, (rows, dim) in enumerate(SHAPES):
            torch.manual_seed(dim)
            x, residual, dy, dsum = torch.randn(4, rows, dim).to(dtype).unbind()
            parameters = [1 + 0.1 * torch.randn(dim), torch.randn(dim)][: 2 if norm == "layer_norm" else 1]
            parameters = [p.to(torch.float32 if i == 3 else dtype) for p in parameters]
            for inputs in ([x], [x, residual]):
                caught += _check(module, norm, inputs, parameters, [dy, dsum][: len(inputs)])
    return caught


def _results(norm: str, wide: bool, *groups: Sequence[Tensor]) -> list[Tensor]:
    inputs, parameters, d_outputs = ([t.double() if wide else t.clone() for t in group] for group in groups)
    leaves = [t.requires_grad_() for t in (*inputs, *parameters)]
    total = leaves[0] + leaves[1] if len(inputs) == 2 else leaves[0]
    y = (layer_norm_reference if norm == "layer_norm" else rms_norm_reference)(total, *leaves[len(inputs) :], EPS)
    outputs = [total, y] if len(inputs) == 2 else [y]
    gradients = torch.autograd.grad(outputs, leaves, d_outputs[::-1])
    return [*(o.detach() for o in outputs), gradients[0], *gradients[len(inputs) :]]


def _check(
    module: ModuleType, norm: str, inputs: Sequence[Tensor], parameters: Sequence[Tensor], d_outputs: Sequence[Tensor]
) -> int:
    """Checks one case; returns how many of its results, once made wrong by 16 units, were caught."""
    name, adds = f"add_{norm}" if len(inputs) == 2 else norm, len(inputs) == 2
    outputs = getattr(module, name)(*inputs, *parameters, EPS)
    results, numbers = outputs[: len(inputs)], outputs[len(inputs) :]
    normalised = results[0] if adds else inputs[0]
    gradients = getattr(module, f"{name}_backward")(*d_outputs, normalised, parameters[0], *numbers)
    plain = _results(norm, False, inputs, parameters, d_outputs)
    exact = _results(norm, True, inputs, parameters, d_outputs)
    name, off = f"{name} {inputs[0].dtype} {tuple(inputs[0].shape)}", 16 * torch.finfo(inputs[0].dtype).eps
    return count_caught(name, (*results, *gradients), plain, exact, len(inputs), off)
