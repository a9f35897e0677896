from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_lite._csrc.rotary import triton as kernels
from megatron_lite.ops.rotary import rotary_reference
from tests.ops.oracle import assert_within
from tests.ops.triton_cases.case import POINTERS, Case, number_dtypes

# Head dimension and how much of it is rotated.
DIMS = ((40, 40), (64, 24), (6, 6), (118, 66))
NUM_CONTROLS = len(number_dtypes()) * len(DIMS) * 2 * 2 * 2  # layouts; angles of a row and of all; q and k


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
        _check(dim, num_rotated, dtype, interleaved, angle_batch)
        for dtype in number_dtypes()
        for dim, num_rotated in DIMS
        for interleaved in (False, True)
        for angle_batch in (1, 2)
    )


def _check(dim: int, num_rotated: int, dtype: torch.dtype, interleaved: bool, angle_batch: int) -> int:
    """Rotates slices of one tensor, and back in place; returns how many wrong angles were caught, of q and k."""
    torch.manual_seed(dim)
    fused = torch.randn(2, 3, 6, dim).to(dtype)
    q, k = fused[:, :, :4], fused[:, :, 4:5]
    theta = 10 * torch.rand(angle_batch, 3, num_rotated // 2)
    cos, sin = theta.cos(), theta.sin()
    outputs = torch.full_like(q, torch.nan), torch.full_like(k, torch.nan)
    kernels.rotate(q, k, cos, sin, interleaved, False, *outputs)
    plain = rotary_reference(q, k, cos, sin, interleaved)
    exact = rotary_reference(q.double(), k.double(), cos.double(), sin.double(), interleaved)
    caught = 0
    for name, actual, p, e in zip(("q", "k"), outputs, plain, exact, strict=True):
        assert_within(f"{name} {dtype} {dim} {num_rotated} {interleaved}", actual, p, e, 2.0)
    for name, actual, p, e in zip(("q", "k"), (q, k), plain, exact, strict=True):
        try:
            assert_within(name, actual.clone(), p, e, 2.0)
        except AssertionError:
            caught += 1
    kernels.rotate(*outputs, cos, sin, interleaved, True, *outputs)
    for name, actual, before in zip(("q", "k"), outputs, (q, k), strict=True):
        unit = 4 * torch.finfo(dtype).eps * float(before.abs().max())  # two roundings of each number, there and back
        assert (actual - before).abs().max() <= unit, f"{name} is not rotated back"
    return caught
