"""The words of the errors for an op's arguments."""

from __future__ import annotations

import math
import re

import numpy as np
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
    for value in (0, 0.5, np.float32(0.25), np.int64(0)):
        checks.require_number("op", "eps", value, 0, 1)
    checks.require_apart("op", x=X[0], y=X[1], z=None, empty=X[0, :0], strided=(X + 1)[:, ::2])


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


@pytest.mark.parametrize("value", [None, "1e-5", True, 10**400, math.nan, math.inf, -1, 1j, X], ids=str)
def test_what_is_no_number_is_named(value: object) -> None:
    got = re.escape(checks.described(value))
    with pytest.raises(ValueError, match=rf"^op: eps is {got}; it takes a finite number, 0 or more$"):
        checks.require_number("op", "eps", value, 0, math.inf)
    with pytest.raises(ValueError, match=rf"^op: eps is {got}; it takes a number from 0 to below 2$"):
        checks.require_number("op", "eps", value, 0, 2)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
def test_a_sparse_tensor_is_none_of_what_an_op_takes(layout: torch.layout) -> None:
    sparse = X.to_sparse() if layout == torch.sparse_coo else X.to_sparse_csr()
    name = str(layout).removeprefix("torch.")
    message = rf"^op: y is \[2, 8\] bf16 on cpu, {name}; it takes a dense tensor$"
    for check in (
        lambda: checks.require_float("op", "y", sparse),
        lambda: checks.require_shape("op", "y", sparse, (2, 8), "[S, D]"),
        lambda: checks.require_alike("op", "x", X, y=sparse),
        lambda: checks.require_device("op", "x", X, y=sparse),
        lambda: checks.require_apart("op", x=X, y=sparse),
    ):
        with pytest.raises(ValueError, match=message):
            check()


def test_memory_that_two_tensors_share_is_found() -> None:
    """Also where a third lies between their beginnings, and where one has gaps."""
    whole = torch.zeros(64)
    message = r"^op: b is \[8\] fp32 on cpu; it takes memory apart from that of a$"
    for one, other in ((whole[:8], whole[7:15]), (whole[8:24], whole[20:28]), (whole[::7], whole[50:58])):
        with pytest.raises(ValueError, match=message):
            checks.require_apart("op", a=one, b=other, c=whole[60:])
