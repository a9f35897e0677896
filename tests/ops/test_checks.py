"""The words of the errors for an op's arguments."""

from __future__ import annotations

import pytest
import torch

from megatron_lite.ops import checks

X = torch.zeros(2, 8, dtype=torch.bfloat16)


def test_what_is_right_passes() -> None:
    checks.require(True, "op", "x", X, "anything")
    checks.require_float("op", "x", X)
    checks.require_shape("op", "x", X, (2, 8), "[S, D]")
    checks.require_alike("op", "x", X, y=X + 1, z=None)
    checks.require_device("op", "x", X, y=X.float(), z=None)


def test_errors_name_op_argument_got_and_takes() -> None:
    with pytest.raises(ValueError, match=r"^op: window is -3; it takes a number of keys, at least 1$"):
        checks.require(False, "op", "window", -3, "a number of keys, at least 1")
    with pytest.raises(ValueError, match=r"^op: x is \[3\] int64 on cpu; it takes bf16 or fp32$"):
        checks.require_float("op", "x", torch.arange(3), {torch.float32, torch.bfloat16})
    with pytest.raises(ValueError, match=r"^op: x is \[2, 8\] bf16 on cpu; it takes \[D\] = \[16\]$"):
        checks.require_shape("op", "x", X, (16,), "[D]")
    alike = r"^op: y is \[2, 8\] fp32 on cpu; it takes the dtype and device of x, bf16 on cpu$"
    with pytest.raises(ValueError, match=alike):
        checks.require_alike("op", "x", X, y=X.float())
    with pytest.raises(ValueError, match=r"^op: y is \[1\] fp32 on meta; it takes the device of x, cpu$"):
        checks.require_device("op", "x", X, y=torch.zeros(1, device="meta"))
