"""What the Triton and the CUDA kernels of the rotary embedding are both held to."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_lite.ops.rotary import rotary_reference
from tests.ops.oracle import assert_within

NUM_CONTROLS = 2 * 2 * 2  # of a dtype and a dimension: layouts; angles of a row and of all; q and k


def check(rotate: Callable[..., None], dim: int, num_rotated: int, dtype: torch.dtype) -> int:
    """Checks rotate(q, k, cos, sin, interleaved, inverse, q_out, k_out); returns how many wrong angles were caught."""
    return sum(
        _check(rotate, dim, num_rotated, dtype, interleaved, angle_batch)
        for interleaved in (False, True)
        for angle_batch in (1, 2)
    )


def _check(
    rotate: Callable[..., None], dim: int, num_rotated: int, dtype: torch.dtype, interleaved: bool, angle_batch: int
) -> int:
    """Rotates slices of one tensor, and back in place; returns how many wrong angles were caught, of q and k."""
    torch.manual_seed(dim)
    fused = torch.randn(2, 3, 6, dim).to(dtype)
    q, k = fused[:, :, :4], fused[:, :, 4:5]
    theta = 10 * torch.rand(angle_batch, 3, num_rotated // 2)
    cos, sin = theta.cos(), theta.sin()
    outputs = torch.full_like(q, torch.nan), torch.full_like(k, torch.nan)
    rotate(q, k, cos, sin, interleaved, False, *outputs)
    plain = rotary_reference(q, k, cos, sin, interleaved)
    exact = rotary_reference(q.double(), k.double(), cos.double(), sin.double(), interleaved)
    caught = 0
    for name, actual, before, p, e in zip(("q", "k"), outputs, (q, k), plain, exact, strict=True):
        assert_within(f"{name} {dtype} {dim} {num_rotated} {interleaved}", actual, p, e, 2.0)
        try:
            assert_within(name, before.clone(), p, e, 2.0)
        except AssertionError:
            caught += 1
    rotate(*outputs, cos, sin, interleaved, True, *outputs)
    for name, actual, before in zip(("q", "k"), outputs, (q, k), strict=True):
        unit = 4 * torch.finfo(dtype).eps * float(before.abs().max())  # two roundings of each number, there and back
        assert (actual - before).abs().max() <= unit, f"{name} is not rotated back"
    return caught
