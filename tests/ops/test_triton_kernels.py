"""Triton kernels without a GPU: their numbers in the interpreter, and their compilation for sm_80 and sm_90.

What an op brings is tests/ops/triton_cases/<op>.py; see case.py there. Each runs in a process of its own, because
TRITON_INTERPRET is read when Triton is imported. The interpreter computes bf16 wrongly (it truncates stores), so
numbers are checked in fp32 and fp16.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.ops.oracle import ROOT, run_python
from tests.ops.triton_cases.case import ONES

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
    if op in ("attention", "rotary"):  # some have no integers but multiples of 16
        assert any(case["name"].endswith(ONES) for case in cases)
    for case in cases:
        registers, shared_bytes = ceilings[case["kernel"]]
        # One query, one key, one head: a few bytes that spill there cost nothing.
        assert case["local_bytes"] == 0 or case["name"].endswith(ONES), f"it spills: {case}"
        assert case["registers"] <= registers and case["shared_bytes"] <= shared_bytes, case


CONTROL = """
import triton
import triton.language as tl
from tests.ops.triton_cases.case import Case
from tests.ops.triton_cases.runner import compiled, with_ones

@triton.jit(do_not_specialize=["left"])
def control(out_ptr, count, left, SIZE: tl.constexpr):
    tl.static_assert(SIZE > 1)
    tl.static_assert(count.type == tl.int32)  # of a constant the type is another
    tl.store(out_ptr, count + left)

case = Case("control", control, {"out_ptr": "*i32", "count": "i32", "left": "i32", "absent": "i32"}, {"SIZE": 2})
cases = list(with_ones([case, case], 80))
assert [one.name for one in cases] == ["control", "control, integers 1", "control"]
assert cases[1].constants == {"SIZE": 2, "count": 1}
compiled(case, 80)
compiled(cases[1], 80)
"""


@needs_triton
def test_integers_that_are_1_are_compiled_as_a_launch_does(tmp_path: Path) -> None:
    """Negative control: a kernel that compiles, until an integer is 1 and therefore a constant."""
    (tmp_path / "control.py").write_text(CONTROL)
    with pytest.raises(AssertionError, match=r"compiled\(cases\[1\], 80\)(.|\n)*CompileTimeAssertionFailure"):
        run_python(str(tmp_path / "control.py"), TRITON_INTERPRET="0", PYTHONPATH=str(ROOT))
