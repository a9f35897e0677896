"""Triton kernels without a GPU: their numbers in the interpreter, and their compilation for sm_80 and sm_90.

What an op brings is tests/ops/triton_cases/<op>.py; see case.py there. Each runs in a process of its own, because
TRITON_INTERPRET is read when Triton is imported. The interpreter computes bf16 wrongly (it truncates stores), so
numbers are checked in fp32 and fp16.
"""

from __future__ import annotations

import importlib.util
import json

import pytest

from tests.ops.oracle import ROOT, run_python

OPS = sorted(path.parent.name for path in (ROOT / "csrc").glob("*/triton.py"))
RUNNER = ("-m", "tests.ops.triton_cases.runner")
DTYPES = ("fp32", "bf16", "fp16")

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def test_every_op_with_triton_kernels_brings_cases() -> None:
    missing = [op for op in OPS if not (ROOT / f"tests/ops/triton_cases/{op}.py").exists()]
    assert OPS and not missing, f"no tests/ops/triton_cases/<op>.py for {missing}"


@needs_triton
@pytest.mark.parametrize("op", OPS)
def test_numbers_in_the_interpreter(op: str) -> None:
    """The process fails on a wrong number, and counts which of its negative controls it caught."""
    caught, wrong = json.loads(run_python(*RUNNER, "numbers", op, TRITON_INTERPRET="1"))
    assert caught == wrong > 0


@needs_triton
@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("op", OPS)
def test_compiles_without_spills_and_under_its_ceilings(op: str, sm: int) -> None:
    report = json.loads(run_python(*RUNNER, "compile", op, str(sm), TRITON_INTERPRET="0"))
    cases, ceilings = report["cases"], report["ceilings"]
    for dtype in DTYPES:
        assert any(dtype in case["name"] for case in cases), f"no case has {dtype} in its name"
    assert {case["kernel"] for case in cases} == set(ceilings), "the kernels of the cases and those of CEILINGS"
    for case in cases:
        registers, shared_bytes = ceilings[case["kernel"]]
        assert case["local_bytes"] == 0, f"it spills: {case}"
        assert case["registers"] <= registers and case["shared_bytes"] <= shared_bytes, case
