"""Triton kernels without a GPU: their numbers in the interpreter, and their compilation for sm_80 and sm_90.

Each runs in a process of its own, because TRITON_INTERPRET is read when Triton is imported. The interpreter computes bf16
wrongly (it truncates stores), so numbers are checked in fp32 and fp16.
"""

from __future__ import annotations

import importlib.util
import json

import pytest

from tests.ops.oracle import run_python

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

INTERPRET = """
import torch
from megatron_lite.ops.rms_norm import rms_norm_reference
from megatron_lite._csrc.rms_norm import triton as kernels
from tests.ops.oracle import assert_within

checked = 0
for dtype in (torch.float32, torch.float16):
    for rows, dim, weight_dtype in ((1, 40, dtype), (3, 59, dtype), (67, 111, dtype), (33, 128, torch.float32)):
        torch.manual_seed(dim)
        x, weight = torch.randn(rows, dim).to(dtype), (1 + 0.1 * torch.randn(dim)).to(weight_dtype)
        dy = torch.randn(rows, dim).to(dtype)
        y, rstd = kernels.forward(x, weight, 1e-5)
        dx, dweight = kernels.backward(dy, x, weight, rstd)

        def plain(convert):
            leaves = [convert(x).requires_grad_(), convert(weight).requires_grad_()]
            out = rms_norm_reference(*leaves, 1e-5)
            return [out.detach(), *torch.autograd.grad(out, leaves, convert(dy))]

        results = zip(("y", "dx", "dweight"), (y, dx, dweight), plain(torch.clone), plain(torch.Tensor.double), strict=True)
        for name, actual, expected, exact in results:
            factor = 2.0 if name == "y" else 3.0
            assert_within(f"{name} {dtype} {rows}x{dim}", actual, expected, exact, factor)
            try:
                assert_within(name, actual * (1 + 16 * torch.finfo(dtype).eps), expected, exact, factor)
            except AssertionError:
                checked += 1  # the negative control: a result off by 16 units is caught
print(checked)
"""

COMPILE = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_lite._csrc.rms_norm import triton as kernels

sm, number = int(sys.argv[1]) if len(sys.argv) > 1 else SM, {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16"}
tools = Path(triton.__file__).parent / "backends/nvidia/bin"

def compiled(kernel, signature, constants, warps):
    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs={(kernel.arg_names.index(n),): v for n, v in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": warps})

results = {}
for dtype in ("fp32", "bf16", "fp16"):
    for block in (512, 16384):
        p = number[dtype]
        warps = kernels.num_warps(block)
        f = compiled(kernels.rms_norm_forward, dict(x_ptr=p, weight_ptr=p, y_ptr=p, rstd_ptr="*fp32", dim="i32", eps="fp32"),
                     dict(BLOCK_DIM=block), warps)
        b = compiled(kernels.rms_norm_backward, dict(dy_ptr=p, x_ptr=p, weight_ptr=p, rstd_ptr="*fp32", dx_ptr=p,
                     parts_ptr="*fp32", rows="i32", dim="i32"), dict(ROWS=kernels.ROWS_PER_PROGRAM, BLOCK_DIM=block), warps)
        results[f"forward {dtype} {block}"], results[f"backward {dtype} {block}"] = f, b
    results[f"sum_parts {dtype}"] = compiled(kernels.rms_norm_sum_parts, dict(parts_ptr="*fp32", dweight_ptr=number[dtype],
        num_parts="i32", dim="i32"), dict(BLOCK_PARTS=32, BLOCK_DIM=64), 4)

report = {}
for name, binary in results.items():
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"]); file.flush()
        usage = subprocess.run([tools / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True)
    fields = dict(re.findall(r"(REG|STACK|LOCAL):(\\d+)", usage.stdout))
    report[name] = {"registers": int(fields["REG"]), "local_bytes": int(fields["STACK"]) + int(fields["LOCAL"]),
                    "shared_bytes": binary.metadata.shared}
print(json.dumps(report))
"""


def test_numbers_in_the_interpreter() -> None:
    """fp32 and fp16, four shapes, three results each; the script counts how many negative controls it caught."""
    assert run_python(INTERPRET, TRITON_INTERPRET="1").strip() == str(2 * 4 * 3)


@pytest.mark.parametrize("sm", [80, 90])
def test_compiles_without_spills(sm: int) -> None:
    report = json.loads(run_python(COMPILE.replace("SM,", f"{sm},"), TRITON_INTERPRET="0"))
    assert len(report) == 15
    for name, usage in report.items():
        assert usage["local_bytes"] == 0, f"{name} spills: {usage}"
        assert usage["registers"] <= 255 and usage["shared_bytes"] <= 16 * 1024, f"{name}: {usage}"
