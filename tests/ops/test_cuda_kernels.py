"""CUDA kernels without a GPU: what nvcc makes of them for sm_80 and sm_90, and their numbers, emulated on the CPU.

What an op brings is a line `// ceiling: ...` above each kernel, and tests/ops/cuda_cases/<op>.py; see runner.py there.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.ops.emulation import build
from tests.ops.oracle import ROOT, run_python

SOURCES = sorted((ROOT / "csrc").glob("*/cuda*.cu"))
OPS = sorted({path.parent.name for path in SOURCES})
CEILING = re.compile(r"// ceiling: (\d+) registers, (\d+) bytes of shared memory")
# The name of a kernel: what stands before its parameters, behind `void` and its launch bounds in either order.
KERNEL = re.compile(r"__global__\s+(?:void\s+|__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)*(\w+)\s*\(")
ORDERS = ("0", "1", "7")  # threads run from the first to the last, from the last to the first, shuffled

needs_emulation = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))
needs_nvcc = pytest.mark.skipif(build.NVCC is None, reason="nvcc is not installed")


def ceilings_of(text: str) -> dict[str, tuple[int, int]]:
    """Kernel -> registers and bytes of static shared memory at most. A kernel without its line is an error."""
    ceilings = {}
    for kernel in KERNEL.finditer(text):
        lines = text[: kernel.start()].splitlines()
        above = []  # back to the end of whatever stands before this kernel
        while lines and (lines[-1].lstrip().startswith("//") or not re.search(r"[;{}]", lines[-1])) and lines[-1]:
            above.append(lines.pop())
        found = CEILING.search("\n".join(above))
        assert found is not None, f"{kernel[1]}: no line `// ceiling: ...` above it"
        ceilings[kernel[1]] = int(found[1]), int(found[2])
    assert len(ceilings) == text.count("__global__"), "not every kernel was understood"
    return ceilings


def usage_of(ptxas: str) -> list[tuple[str, dict[str, int]]]:
    """(mangled name, registers, static shared memory, spills and stack) of each kernel in ptxas's report."""
    usage = []
    for part in ptxas.split("Compiling entry function '")[1:]:
        numbers = {"registers": r"Used (\d+) registers", "shared_bytes": r"(\d+) bytes smem"}
        numbers |= {"stack": r"(\d+) bytes stack", "stores": r"(\d+) bytes spill st", "loads": r"(\d+) bytes spill lo"}
        found = {name: re.search(pattern, part) for name, pattern in numbers.items()}
        usage.append((part.partition("'")[0], {name: int(match[1]) if match else 0 for name, match in found.items()}))
    return usage


def test_every_op_with_cuda_kernels_brings_cases() -> None:
    missing = [op for op in OPS if not (ROOT / f"tests/ops/cuda_cases/{op}.py").exists()]
    assert OPS and not missing, f"no tests/ops/cuda_cases/<op>.py for {missing}"


@needs_nvcc
@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_compiles_without_spills_and_under_its_ceilings(source: Path, sm: int, tmp_path: Path) -> None:
    result = subprocess.run(
        [
            *(str(build.NVCC), "-std=c++17", "-O3", f"-gencode=arch=compute_{sm},code=sm_{sm}", "-Xptxas", "-v"),
            *(f"-I{ROOT / 'csrc'}", "-cubin", str(source), "-o", str(tmp_path / "kernel.cubin")),
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    ceilings, compiled = ceilings_of(source.read_text()), set()
    for mangled, usage in usage_of(result.stderr):
        (kernel,) = [name for name in ceilings if f"{len(name)}{name}" in mangled]
        compiled.add(kernel)
        registers, shared_bytes = ceilings[kernel]
        assert usage["stores"] == usage["loads"] == usage["stack"] == 0, f"{mangled} spills: {usage}"
        assert usage["registers"] <= registers and usage["shared_bytes"] <= shared_bytes, f"{mangled}: {usage}"
    assert compiled == set(ceilings), "a kernel that nothing launches"


def test_a_kernel_without_a_ceiling_is_noticed() -> None:
    """Negative control."""
    line = "// ceiling: 40 registers, 0 bytes of shared memory\n"
    kernel = "// Doubles; in place.\ntemplate <class T>\n__global__ void __launch_bounds__(kMax)\n    f(T* x) {\n}\n"
    assert ceilings_of(line + kernel) == {"f": (40, 0)}
    with pytest.raises(AssertionError, match="f: no line"):
        ceilings_of(line + kernel.replace("f(", "g(") + "\n" + kernel)


@needs_emulation
@pytest.mark.parametrize("op", OPS)
def test_numbers_in_the_emulation(op: str) -> None:
    """Right whatever the order of the threads, to the same bits; and what is made wrong is caught."""
    build.build()  # once, not in each of the processes

    def run(order: str) -> tuple[int, int, str]:
        return json.loads(run_python("-m", "tests.ops.cuda_cases.runner", op, order, OMP_NUM_THREADS="1"))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(run, ORDERS))
    for caught, wrong, digest in results:
        assert caught == wrong > 0
        assert digest == results[0][2], "the bits depend on the order in which threads run"
