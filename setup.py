"""Builds csrc/ into two shared libraries inside the package, from whatever compilers are there.

The kernels target torch's stable ABI (torch 2.11 and up, any Python), so they are compiled without pybind11 and without
torch/extension.h, in seconds. The data loader's index (csrc/data) knows numpy and not torch: a pybind11 module. A part
that cannot be built is left out, with the reason printed and written next to the kernels, where
`megatron_lite.ops.native` reads it: an install never fails for want of a compiler. (pip shows what setup.py prints only
with -v.)

Environment, read at build time only: CXX (C++ compiler), CUDA_HOME (toolkit), NVCC (CUDA compiler).
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
KERNELS, INDEX = "megatron_lite.ops._native", "megatron_lite.data._index"
REPORT = "_native_build.json"

# cpu.cpp of an op is compiled once for each of the first three, and cpu_<set>.cpp for that set alone; the op's
# binding_cpu.cpp picks one when it runs.
CPU_FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"],
}
CPU_FLAGS["avx512bf16"] = [*CPU_FLAGS["avx512"], "-mavx512bf16"]
FOR_EVERY_OP = ("portable", "avx2", "avx512")
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wno-psabi"]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# Machine code for A100 and H100, and PTX that later GPUs compile for themselves.
NVCC_FLAGS = [
    *("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static"),
    *("-gencode", "arch=compute_80,code=sm_80"),
    *("-gencode", "arch=compute_90,code=[sm_90,compute_90]"),
]


class MissingError(Exception):
    """A part of the library cannot be built; the message says why."""


def run_compiler(command: list[str]) -> None:
    """Runs a compiler. Raises MissingError with the last lines of its output when it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except OSError as error:
        raise MissingError(f"{command[0]} does not run: {error.strerror}") from error
    if result.returncode != 0:
        tail = " | ".join((result.stderr or result.stdout).strip().splitlines()[-6:])
        raise MissingError(f"{Path(command[0]).name} failed: {tail}")


def find_cxx() -> list[str]:
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        if shutil.which(command[0]) is None:
            raise MissingError(f"the C++ compiler CXX={os.environ['CXX']} is not there")
        return command
    for name in ("g++", "clang++", "c++"):
        if (path := shutil.which(name)) is not None:
            return [path]
    raise MissingError("no C++ compiler (g++, clang++ or c++) on PATH")


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    candidates = [os.environ.get("NVCC"), home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        if candidate and (path := shutil.which(candidate)) is not None:
            return path
    raise MissingError("no nvcc: not at $NVCC, in $CUDA_HOME/bin, on PATH or in /usr/local/cuda/bin")


def find_torch() -> Path:
    """The folder of the installed torch, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise MissingError("torch cannot be imported at build time; use --no-build-isolation")
    return Path(spec.origin).parent


def instruction_sets() -> list[str]:
    return list(CPU_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["portable"]


def compile_cpu(cxx: list[str], torch_dir: Path, objects: Path, with_cuda: bool) -> list[str]:
    """Compiles the C++ files of every csrc/<op>: its bindings, and its CPU kernels for their instruction sets."""
    sets = instruction_sets()
    includes = [f"-I{torch_dir / 'include'}", f"-I{torch_dir / 'include/torch/csrc/api/include'}"]
    defines = [STABLE_ABI, *(f"-DML_WITH_{isa.upper()}" for isa in sets)]
    jobs: list[tuple[Path, str, list[str]]] = []
    for binding in ("binding_cpu.cpp", *(["binding_cuda.cpp"] if with_cuda else [])):
        jobs += [(source, binding, [*includes, *defines]) for source in sources_of(binding)]
    for isa in sets:
        names = ("cpu.cpp",) if isa in FOR_EVERY_OP else ()
        for source in sources_of(*names, f"cpu_{isa}.cpp"):
            jobs.append((source, f"cpu_{isa}", [f"-DML_ISA={isa}", *CPU_FLAGS[isa]]))
    outputs = [objects / f"{source.parent.name}_{name}.o" for source, name, _ in jobs]
    commands = [
        [*cxx, *CXX_FLAGS, "-Icsrc", *flags, "-c", str(source), "-o", str(output)]
        for (source, _, flags), output in zip(jobs, outputs, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run_compiler, commands))
    return list(map(str, outputs))


def compile_cuda(nvcc: str, objects: Path) -> list[str]:
    """Compiles every csrc/<op>/cuda*.cu, which include no torch header. Returns the object files."""
    sources = sources_of("cuda*.cu")
    outputs = [str(objects / f"{source.parent.name}_{source.stem}.o") for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        commands = [[nvcc, *NVCC_FLAGS, "-Icsrc", "-c", str(s), "-o", o] for s, o in zip(sources, outputs, strict=True)]
        list(pool.map(run_compiler, commands))
    return outputs


def sources_of(*patterns: str) -> list[Path]:
    """The files of these names in the folders of the ops."""
    return sorted(path for pattern in patterns for path in (ROOT / "csrc").glob(f"*/{pattern}"))


def build_library(target: Path, objects: Path) -> dict[str, str | None]:
    """Builds as much of the library as can be. Returns for 'cpu' and 'cuda' None, or why the part is missing."""
    objects.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        cxx, torch_dir = find_cxx(), find_torch()
    except MissingError as error:
        return {"cpu": str(error), "cuda": f"needs the C++ part: {error}"}
    link_flags = [f"-L{torch_dir / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    try:
        nvcc = find_nvcc()
        cuda_objects = compile_cuda(nvcc, objects)
        linked = [*compile_cpu(cxx, torch_dir, objects, with_cuda=True), *cuda_objects]
        # nvcc links, because it knows where its static runtime lies; that runtime loads where there is no driver.
        # Its symbols stay inside the library: torch brings a CUDA runtime of its own.
        hide = ["-Xlinker", "--exclude-libs,ALL"]
        run_compiler([nvcc, "-shared", "-cudart", "static", *hide, *linked, "-o", str(target), *link_flags])
        return {"cpu": None, "cuda": None}
    except MissingError as error:
        cuda_missing = str(error)
    try:
        linked = compile_cpu(cxx, torch_dir, objects, with_cuda=False)
        run_compiler([*cxx, "-shared", *linked, "-o", str(target), *link_flags])
    except MissingError as error:
        return {"cpu": str(error), "cuda": cuda_missing}
    return {"cpu": None, "cuda": cuda_missing}


def build_index(target: Path) -> dict[str, str | None]:
    """Builds csrc/data as a module of this Python. Returns for 'index' None, or why it is missing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        spec = importlib.util.find_spec("pybind11")
        if spec is None or spec.origin is None:
            raise MissingError("pybind11 cannot be imported at build time; pip install pybind11")
        includes = [f"-I{Path(spec.origin).parent / 'include'}", f"-I{sysconfig.get_path('include')}"]
        # On macOS a module finds the interpreter's symbols when it is loaded, and the linker has to be told.
        shared = ["-shared", *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [])]
        run_compiler([*find_cxx(), *CXX_FLAGS, *includes, *shared, "csrc/data/index.cpp", "-o", str(target)])
    except MissingError as error:
        return {"index": str(error)}
    return {"index": None}


class BuildNative(build_ext):
    """build_ext for both libraries: never fails, says what is missing, leaves a report beside the kernels."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.rpartition(".")[2] == INDEX.rpartition(".")[2]:
            return super().get_ext_filename(fullname)  # which names the Python that it was compiled for
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def run(self) -> None:
        self.report: dict[str, str | None] = {}
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        if ext.name == INDEX:
            self.report |= build_index(target)
        else:
            self.report |= build_library(target, Path(self.build_temp).resolve())
        report = target.parents[1] / "ops" / REPORT
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")
        if ext is not self.extensions[-1]:
            return
        for part, name in (("cpu", "CPU kernels"), ("cuda", "CUDA C++ kernels"), ("index", "C++ index of the data")):
            state = f"left out: {self.report[part]}" if self.report[part] else "built"
            print(f"megatron-lite: {name}: {state}", file=sys.stderr)
        if importlib.util.find_spec("triton") is None:
            print("megatron-lite: Triton kernels: unused until `pip install triton`", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        """For an editable install: the libraries and their report go next to the package's sources."""
        super().copy_extensions_to_source()
        report = Path("megatron_lite/ops") / REPORT
        shutil.copyfile(Path(self.build_lib) / report, ROOT / report)
        for ext in self.extensions:
            library = self.get_ext_filename(ext.name)
            if not (Path(self.build_lib) / library).exists():
                (ROOT / library).unlink(missing_ok=True)


def triton_packages() -> list[str]:
    """csrc itself and each op folder with a Triton kernel, as packages under megatron_lite._csrc."""
    ops = sorted(path.parent.name for path in (ROOT / "csrc").glob("*/triton.py"))
    return ["megatron_lite._csrc", *(f"megatron_lite._csrc.{op}" for op in ops)]


setup(
    packages=[*find_packages(include=["megatron_lite", "megatron_lite.*"]), *triton_packages()],
    package_dir={"megatron_lite": "megatron_lite", "megatron_lite._csrc": "csrc"},
    package_data={"megatron_lite": ["py.typed", "report/page.css", "report/page.js"]},
    ext_modules=[
        Extension(KERNELS, sources=["csrc/rms_norm/binding_cpu.cpp"], optional=True),
        Extension(INDEX, sources=["csrc/data/index.cpp"], optional=True),
    ],
    cmdclass={"build_ext": BuildNative},
    zip_safe=False,
)
