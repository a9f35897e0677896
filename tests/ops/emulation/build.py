"""Compiles csrc/*/cuda*.cu and csrc/*/binding_cuda.cpp for the CPU, into one library: see cuda_emulation.h.

The library registers torch.ops.megatron_lite_cuda for tensors on the CPU, as the package's own library does for
tensors on a GPU. So a process loads one of the two; `load` is for a process that the tests start.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from megatron_lite.ops import native

ROOT = Path(__file__).resolve().parents[3]
EMULATION = Path(__file__).parent
BUILD = ROOT / "build/emulation"  # objects and libraries, named by a hash of what they are made from
CXX = os.environ.get("CXX") or shutil.which("g++")
NVCC = os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")

# Kernels read the same bytes under several types (16-byte accesses), which nvcc takes as it is meant. -U: fortified
# longjmp takes a switch of stacks for an error.
FLAGS = [
    *("-std=c++20", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-fno-math-errno"),
    *("-U_FORTIFY_SOURCE", "-w", "-DML_EMULATED", "-DML_CUDA_KEY=CPU", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
]


def missing() -> str | None:
    """Why the library cannot be built here, or None."""
    if CXX is None:
        return "no g++"
    return None if cuda_headers() is not None else "no headers of the CUDA toolkit"


def cuda_headers() -> Path | None:
    """The folder with cuda_bf16.h: of nvcc's toolkit, found by asking it, as it may be a script."""
    candidates = [Path("/usr/local/cuda/include")]
    if NVCC is not None:
        dry = subprocess.run([NVCC, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
        tops = [line.partition("TOP=")[2].strip() for line in dry.splitlines() if "TOP=" in line]
        candidates = [*(Path(top) / "include" for top in tops), *candidates]
    return next((folder for folder in candidates if (folder / "cuda_bf16.h").exists()), None)


def sources() -> list[Path]:
    """The kernels and bindings of all ops, and the emulation itself."""
    csrc = ROOT / "csrc"
    return [*sorted(csrc.glob("*/cuda*.cu")), *sorted(csrc.glob("*/binding_cuda.cpp")), *EMULATION.glob("*.cpp")]


def build(paths: list[Path] | None = None) -> Path:
    """The library made from `paths` (all sources when None); what has not changed is not compiled again."""
    includes = [EMULATION, ROOT / "csrc", Path(torch.__file__).parent / "include", cuda_headers()]
    includes.append(includes[2] / "torch/csrc/api/include")  # type: ignore[operator]
    command = [str(CXX), *FLAGS, *(f"-I{folder}" for folder in includes)]
    headers = sorted([*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh"), *EMULATION.glob("*.h")])
    shared = _hash(torch.__version__, *command, *(path.read_text() for path in headers))

    def compiled(source: Path) -> Path:
        target = BUILD / f"{source.parent.name}_{source.stem}_{_hash(shared, str(source), source.read_text())}.o"
        if not target.exists():
            _run([*command, "-x", "c++", "-c", str(source)], target)
        return target

    BUILD.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, paths or sources()))
    library = BUILD / f"cuda_{_hash(*(path.name for path in objects))}.so"
    if not library.exists():
        torch_lib = Path(torch.__file__).parent / "lib"
        link = [*map(str, objects), f"-L{torch_lib}", "-ltorch", "-ltorch_cpu", "-lc10"]
        _run([str(CXX), "-shared", "-Wl,--no-undefined", *link], library)
    return library


def load(library: Path | None = None) -> ctypes.CDLL:
    """Registers torch.ops.megatron_lite_cuda for the CPU, in a process that does without the package's own library.

    ml_emulation_order(seed) of the result sets the order in which threads run: 0 first to last, 1 last to first, more:
    shuffled. ml_emulation_refuse(number) makes the launch of that number from now fail.
    """
    native.LIBRARY = EMULATION / "none.so"  # megatron_lite_cuda can be registered once only
    assert native.missing_cpu() is not None, "the package's own library is loaded already"
    library = library or build()
    torch.ops.load_library(str(library))
    return ctypes.CDLL(str(library))


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _run(command: list[str], target: Path) -> None:
    """Runs a compiler; `target` appears whole or not at all, since other processes may build at the same time."""
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    result = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr}"
    partial.replace(target)
