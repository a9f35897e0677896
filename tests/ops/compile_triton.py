"""Run by test_triton_kernels.py as `python -m tests.ops.compile_triton 80`: compiles every Triton kernel for that GPU.

Prints, as JSON, registers, bytes of local memory (spills) and bytes of shared memory of each kernel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_lite._csrc.rms_norm import triton as kernels

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compiled(kernel: Any, sm: int, warps: int, types: dict[str, str], constants: dict[str, int]) -> Any:
    """`kernel` for compute capability `sm` / 10, its arguments of these types, its constants with these values."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    positions = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=positions)
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": warps})


def usage(binary: Any) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        dump = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    fields = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump.stdout)}
    return {
        "registers": fields["REG"],
        "local_bytes": fields["STACK"] + fields["LOCAL"],
        "shared_bytes": binary.metadata.shared,
    }


def main(sm: int) -> None:
    report = {}
    for dtype in ("*fp32", "*bf16", "*fp16"):
        rows = dict.fromkeys(("x_ptr", "weight_ptr", "y_ptr", "dy_ptr", "dx_ptr"), dtype)
        types = {**rows, "rstd_ptr": "*fp32", "parts_ptr": "*fp32", "rows": "i32", "dim": "i32", "eps": "fp32"}
        for block in (512, kernels.MAX_DIM):
            warps, constants = kernels.num_warps(block), {"BLOCK_DIM": block}
            forward = compiled(kernels.rms_norm_forward, sm, warps, types, constants)
            report[f"forward {dtype} {block}"] = usage(forward)
            constants["ROWS"] = kernels.ROWS_PER_PROGRAM
            report[f"backward {dtype} {block}"] = usage(
                compiled(kernels.rms_norm_backward, sm, warps, types, constants)
            )
        types = {"parts_ptr": "*fp32", "dweight_ptr": dtype, "num_parts": "i32", "dim": "i32"}
        constants = {"BLOCK_PARTS": 32, "BLOCK_DIM": 64}
        report[f"sum_parts {dtype}"] = usage(compiled(kernels.rms_norm_sum_parts, sm, 4, types, constants))
    print(json.dumps(report))


if __name__ == "__main__":
    main(int(sys.argv[1]))
