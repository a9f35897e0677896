"""Triton kernels without a GPU: their numbers in the interpreter, and their compilation for sm_80 and sm_90.

Each runs in a process of its own, because TRITON_INTERPRET is read when Triton is imported. The interpreter computes
bf16 wrongly (it truncates stores), so numbers are checked in fp32 and fp16.
"""

from __future__ import annotations

import importlib.util
import json

import pytest

from tests.ops.oracle import run_python

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def test_numbers_in_the_interpreter() -> None:
    """Two dtypes, four shapes, three results each: the script fails on a wrong number, and counts what it caught."""
    assert run_python("-m", "tests.ops.interpret_triton", TRITON_INTERPRET="1").strip() == str(2 * 4 * 3)


@pytest.mark.parametrize("sm", [80, 90])
def test_compiles_without_spills(sm: int) -> None:
    report = json.loads(run_python("-m", "tests.ops.compile_triton", str(sm), TRITON_INTERPRET="0"))
    assert len(report) == 15
    for name, usage in report.items():
        assert usage["local_bytes"] == 0, f"{name} spills: {usage}"
        assert usage["registers"] <= 255 and usage["shared_bytes"] <= 16 * 1024, f"{name}: {usage}"
