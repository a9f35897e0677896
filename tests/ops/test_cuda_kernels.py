"""CUDA kernels without a GPU: what nvcc makes of them for sm_80 and sm_90, and their numbers, emulated on the CPU.

What an op brings is a line `// ceiling: ...` above each kernel, and tests/ops/cuda_cases/<op>.py; see runner.py there.
The kernels are in csrc/<op>/cuda*.cu, or in a header of csrc/common that it includes.
"""

from __future__ import annotations

import ctypes
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


INCLUDE = re.compile(r'^#include "(common/\w+\.cuh)"', re.MULTILINE)


def with_headers(source: Path) -> str:
    """The text of a .cu file and of the headers of csrc/common that it includes, one through another, each once."""
    texts = {source: source.read_text()}
    found = [source]
    while found:
        headers = [ROOT / "csrc" / name for name in INCLUDE.findall(texts[found.pop()])]
        for header in headers:
            if header not in texts:
                texts[header] = header.read_text()
                found.append(header)
    return "\n".join(texts.values())


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
    ceilings, compiled = ceilings_of(with_headers(source)), set()
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


@needs_nvcc
def test_a_launch_that_fails_is_an_error_code(tmp_path: Path) -> None:
    """Of the real launch, which the emulation replaces. Where there is no GPU, no launch succeeds."""
    program = tmp_path / "launch_errors"
    source = build.EMULATION / "launch_errors.cu"
    command = [str(build.NVCC), "-std=c++17", f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)]
    subprocess.run(command, check=True, timeout=600)
    codes = [int(code) for code in subprocess.run([program], capture_output=True, check=True).stdout.split()]
    assert len(codes) == 5 and 0 not in codes
    assert codes[1:3] == [9, 9], "more blocks than a grid takes: cudaErrorInvalidConfiguration, from `launch` itself"


@needs_emulation
def test_more_blocks_than_a_grid_takes_are_an_error() -> None:
    """Of every op that launches a block for some rows or numbers: a count beyond 32 bits must not start a few."""
    text = (build.EMULATION / "grid_controls.cu").read_text()
    kernels = [ROOT / "csrc" / op / "cuda.cu" for op in re.findall(r'^#include "(\w+)/cuda.h"', text, re.MULTILINE)]
    library = ctypes.CDLL(
        str(build.build([*kernels, build.EMULATION / "grid_controls.cu", build.EMULATION / "cuda_emulation.cpp"]))
    )
    controls = re.findall(r"^CONTROL (\w+)", text, re.MULTILINE)
    assert controls
    for control in controls:
        library.ml_emulation_refuse(0)  # so that a launch that is made returns, and is seen
        assert getattr(library, control)() == 9, f"{control}: cudaErrorInvalidConfiguration"
        assert library.ml_emulation_refuse(-1) == 0, f"{control} was launched"


@needs_emulation
@pytest.mark.parametrize("op", OPS)
def test_numbers_in_the_emulation(op: str) -> None:
    """Right whatever the order of the threads, to the same bits; what is made wrong is caught, and a launch that fails,
    or a tensor on another device, raises."""
    build.build()  # once, not in each of the processes

    def run(order: str) -> tuple[int, int, str, dict[str, int]]:
        return json.loads(run_python("-m", "tests.ops.cuda_cases.runner", op, order, OMP_NUM_THREADS="1"))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(run, ORDERS))
    for caught, wrong, digest, launches in results:
        assert caught == wrong > 0
        assert launches and all(launches.values()), f"an operator that launches nothing: {launches}"
        assert digest == results[0][2], "the bits depend on the order in which threads run"
