from __future__ import annotations

import torch

from megatron_lite.ops.rotary import rotary_reference
from tests.ops.oracle import assert_within

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Head dimension and how much of it is rotated: runs of a 16-byte access, single numbers, a rest that is copied.
DIMS = ((64, 64), (40, 40), (64, 48), (118, 66), (6, 0))
NUM_CONTROLS = len(DTYPES) * (len(DIMS) - 1) * 2 * 2 * 2  # layouts; angles of a row and of all; q and k


def check_numbers() -> int:
    caught = 0
    for dtype in DTYPES:
        for dim, num_rotated in DIMS:
            for interleaved in (False, True):
                caught += sum(_check(dim, num_rotated, dtype, interleaved, angle_batch) for angle_batch in (1, 2))
        empty = torch.empty(1, 0, 2, 8, dtype=dtype)
        no_angles = torch.empty(1, 0, 4)
        torch.ops.megatron_lite_cuda.rotary(empty, empty, no_angles, no_angles, False, False, empty, empty, 0)
    return caught


def _check(dim: int, num_rotated: int, dtype: torch.dtype, interleaved: bool, angle_batch: int) -> int:
    """Rotates slices of one tensor, and back in place; returns how many wrong angles were caught, of q and k."""
    torch.manual_seed(dim)
    fused = torch.randn(2, 3, 6, dim).to(dtype)
    q, k = fused[:, :, :4], fused[:, :, 4:5]
    theta = 10 * torch.rand(angle_batch, 3, num_rotated // 2)
    cos, sin = theta.cos(), theta.sin()
    outputs = torch.full_like(q, torch.nan), torch.full_like(k, torch.nan)
    torch.ops.megatron_lite_cuda.rotary(q, k, cos, sin, interleaved, False, *outputs, 0)
    plain = rotary_reference(q, k, cos, sin, interleaved)
    exact = rotary_reference(q.double(), k.double(), cos.double(), sin.double(), interleaved)
    caught = 0
    for name, actual, before, p, e in zip(("q", "k"), outputs, (q, k), plain, exact, strict=True):
        assert_within(f"{name} {dtype} {dim} {num_rotated} {interleaved}", actual, p, e, 2.0)
        try:
            assert_within(name, before.clone(), p, e, 2.0)
        except AssertionError:
            caught += 1
    torch.ops.megatron_lite_cuda.rotary(*outputs, cos, sin, interleaved, True, *outputs, 0)
    for name, actual, before in zip(("q", "k"), outputs, (q, k), strict=True):
        unit = 4 * torch.finfo(dtype).eps * float(before.abs().max())  # two roundings of each number, there and back
        assert (actual - before).abs().max() <= unit, f"{name} is not rotated back"
    return caught
