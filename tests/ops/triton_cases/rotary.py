from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_lite._csrc.rotary import triton as kernels
from tests.ops import rotary_checks
from tests.ops.triton_cases.case import POINTERS, Case, number_dtypes

# Head dimension and how much of it is rotated.
DIMS = ((40, 40), (64, 24), (6, 6), (118, 66))
NUM_CONTROLS = len(number_dtypes()) * len(DIMS) * rotary_checks.NUM_CONTROLS


def compile_cases() -> Iterator[Case]:
    strides = ("in_batch", "in_token", "in_head", "out_batch", "out_token", "out_head")
    counts = dict.fromkeys(("heads", "tokens", "first", "angle_batch_stride"), "i32")
    for dtype, pointer in POINTERS.items():
        types = {
            "in_ptr": pointer,
            "out_ptr": pointer,
            "cos_ptr": "*fp32",
            "sin_ptr": "*fp32",
            "sign": "fp32",
            **counts,
        }
        types |= dict.fromkeys((*strides, "half", "dim"), "i32:16")
        for half in (16, 64, 128):
            block_heads, block_half = kernels.blocks(half, 32)
            for interleaved in (False, True):
                constants = {"INTERLEAVED": interleaved, "BLOCK_HEADS": block_heads, "BLOCK_HALF": block_half}
                name = f"rotate {dtype} {half} {interleaved}"
                yield Case(name, kernels.rotary_rotate, types, constants, kernels.NUM_WARPS)
            constants = {"BLOCK_HEADS": block_heads, "BLOCK_REST": block_half}
            yield Case(f"copy_rest {dtype} {half}", kernels.rotary_copy_rest, types, constants, kernels.NUM_WARPS)


def check_numbers() -> int:
    empty = torch.empty(1, 0, 2, 8)
    kernels.rotate(empty, empty, empty[:, :, 0, :4], empty[:, :, 0, :4], False, False, empty, empty)
    return sum(
        rotary_checks.check(kernels.rotate, dim, num_rotated, dtype)
        for dtype in number_dtypes()
        for dim, num_rotated in DIMS
    )
