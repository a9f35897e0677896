"""Builds csrc/ into two shared libraries inside the package, from whatever compilers are there.

The kernels target torch's stable ABI (torch 2.11 and up, any Python), so they are compiled without pybind11 and without
torch/extension.h, in seconds. The data loader's index (csrc/data) knows numpy and not torch: a pybind11 module. A part
that cannot be built is left out, with the reason printed and written next to the kernels, where
`megatron_lite.ops.native` reads it: an install never fails for want of a compiler. What is asked for by name and wrong
ends it. (pip shows what setup.py prints only with -v.)

Environment, read at build time only: CXX (C++ compiler), CUDA_HOME (toolkit), NVCC (CUDA compiler),
MEGATRON_LITE_CUDA_ARCHS ("80 90": the compute capabilities to compile for, where those of the GPUs that are present,
and both of these where none is, will not do).
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import OptionError

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
# A use of each set: a compiler may know a flag and have an assembler that does not know its instructions.
PROBES = {
    "portable": "int f(int a) { return a; }",
    "avx2": "#include <immintrin.h>\n__m256d f(__m256d a) { return _mm256_fmadd_pd(a, a, a); }",
    "avx512": "#include <immintrin.h>\n__m512i f(__m512i a) { return _mm512_add_epi16(a, _mm512_mullo_epi64(a, a)); }",
    "avx512bf16": "#include <immintrin.h>\n__m512 f(__m512 a, __m512bh b) { return _mm512_dpbf16_ps(a, b, b); }",
}
FOR_EVERY_OP = ("portable", "avx2", "avx512")
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wno-psabi"]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static"]
# The compute capabilities that the tests compile for: A100 and what followed it, H100 and what followed it.
CUDA_ARCHS = (80, 90)
CUDA_ARCHS_VARIABLE = "MEGATRON_LITE_CUDA_ARCHS"
# The ops whose files take longest to compile: they are begun with, so that no core waits for them at the end.
LONGEST = ("attention", "layer_norm", "rms_norm")


class MissingError(Exception):
    """A part of the library cannot be built; the message says why."""


@dataclass(frozen=True)
class Job:
    """One file to compile, and the threads that its compiler uses."""

    source: Path
    output: Path
    command: list[str]
    threads: int = 1


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


def instruction_sets(cxx: list[str]) -> tuple[list[str], str | None]:
    """The instruction sets that this compiler can compile for, and why there are no more, or None. Each builds on the
    one before, so the first that it cannot compile for is the last that is tried."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ["portable"], None
    sets: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        for isa, flags in CPU_FLAGS.items():
            source.write_text(PROBES[isa] + "\n", encoding="utf-8")
            try:
                run_compiler([*cxx, *CXX_FLAGS, *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))])
            except MissingError as error:
                if isa == "portable":
                    raise
                return sets, f"{isa}: {error}"
            sets.append(isa)
    return sets, None


def named_archs() -> list[int]:
    """The compute capabilities that the environment names. Raises OptionError for a word that is none, and for one that
    nvcc, where it is there, does not compile for."""
    named = os.environ.get(CUDA_ARCHS_VARIABLE, "").replace(",", " ").split()
    if wrong := [word for word in named if not re.fullmatch(r"[89]\d|1\d\d", word)]:
        raise OptionError(
            f"{CUDA_ARCHS_VARIABLE} takes compute capabilities from 80, as in '80 90'; it has {wrong[0]!r}"
        )
    if not named:
        return []
    try:
        nvcc = find_nvcc()
        printed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
    except (MissingError, OSError):
        printed = ""
    known = re.findall(r"^sm_(\d+)$", printed, re.MULTILINE)
    if wrong := [word for word in named if known and word not in known]:
        raise OptionError(f"{CUDA_ARCHS_VARIABLE} has {wrong[0]!r}; {nvcc} compiles for {', '.join(known)}")
    return sorted({int(word) for word in named})


def cuda_archs() -> list[int]:
    """The compute capabilities to compile for: those that the environment names; else those of the GPUs that are here;
    else CUDA_ARCHS."""
    if named := named_archs():
        return named
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        printed = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        printed = ""
    here = [int(major + minor) for major, minor in re.findall(r"^(\d+)\.(\d)$", printed, re.MULTILINE)]
    # Machine code runs on later GPUs of the same generation; those of later generations compile the PTX of the last.
    usable = {max(arch for arch in CUDA_ARCHS if arch <= gpu) for gpu in here if gpu >= CUDA_ARCHS[0]}
    return sorted(usable or CUDA_ARCHS)


def arch_flags(archs: list[int]) -> list[str]:
    """nvcc's flags for machine code for these, and for PTX of the last, which later GPUs compile for themselves."""
    codes = [f"arch=compute_{arch},code=sm_{arch}" for arch in archs[:-1]]
    codes.append(f"arch=compute_{archs[-1]},code=[sm_{archs[-1]},compute_{archs[-1]}]")
    return [flag for code in codes for flag in ("-gencode", code)]


def cpu_jobs(cxx: list[str], sets: list[str], torch_dir: Path, objects: Path, with_cuda: bool) -> list[Job]:
    """The C++ files of every csrc/<op>: its bindings, and its CPU kernels for their instruction sets."""
    includes = [f"-I{torch_dir / 'include'}", f"-I{torch_dir / 'include/torch/csrc/api/include'}"]
    defines = [STABLE_ABI, *(f"-DML_WITH_{isa.upper()}" for isa in sets)]
    found: list[tuple[Path, str, list[str]]] = []
    for binding in ("binding_cpu.cpp", *(["binding_cuda.cpp"] if with_cuda else [])):
        found += [(source, binding, [*includes, *defines]) for source in sources_of(binding)]
    for isa in sets:
        names = ("cpu.cpp",) if isa in FOR_EVERY_OP else ()
        # Where there are faster sets only a CPU without AVX2 runs the portable one: half the time to compile is worth
        # more than its speed.
        level = ["-O2"] if isa == "portable" and len(sets) > 1 else []
        for source in sources_of(*names, f"cpu_{isa}.cpp"):
            found.append((source, f"cpu_{isa}", [f"-DML_ISA={isa}", *CPU_FLAGS[isa], *level]))
    jobs = []
    for source, name, flags in found:
        output = objects / f"{source.parent.name}_{name}.o"
        command = [*cxx, *CXX_FLAGS, "-Icsrc", *flags, "-c", str(source), "-o", str(output)]
        jobs.append(Job(source, output, command))
    return jobs


def cuda_jobs(nvcc: str, archs: list[int], objects: Path) -> list[Job]:
    """Every csrc/<op>/cuda*.cu, which include no torch header. The code for each architecture is made at the same time,
    as far as there are cores: the longest file is what an install waits for."""
    threads = min(len(archs), os.cpu_count() or 1)
    jobs = []
    for source in sources_of("cuda*.cu"):
        output = objects / f"{source.parent.name}_{source.stem}.o"
        flags = [*NVCC_FLAGS, "--threads", str(threads), *arch_flags(archs), "-Icsrc"]
        jobs.append(Job(source, output, [nvcc, *flags, "-c", str(source), "-o", str(output)], threads))
    return jobs


def compile_all(jobs: Iterable[Job]) -> list[str]:
    """Runs them on all cores, one thread on each, the longest first. Returns the object files. Raises MissingError for
    the first that fails; those that have not begun are then left out."""
    ordered = sorted(jobs, key=lambda job: (job.source.suffix != ".cu", job.source.parent.name not in LONGEST))
    cores = os.cpu_count() or 1
    free, turn = threading.Semaphore(cores), threading.Lock()

    def compile_one(job: Job) -> None:
        held = min(job.threads, cores)
        with turn:  # one takes its cores at a time: two with half of theirs would wait for each other
            for _ in range(held):
                free.acquire()
        try:
            run_compiler(job.command)
        finally:
            free.release(held)

    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(compile_one, ordered))
    return [str(job.output) for job in ordered]


def sources_of(*patterns: str) -> list[Path]:
    """The files of these names in the folders of the ops."""
    return sorted(path for pattern in patterns for path in (ROOT / "csrc").glob(f"*/{pattern}"))


def build_library(target: Path, objects: Path) -> dict[str, str | None]:
    """Builds as much of the library as can be. Returns for 'cpu' and 'cuda' None, or why the part is missing; and what
    they were built for: 'cpu_sets', with why there are no more in 'cpu_sets_missing', and 'cuda_archs'."""
    objects.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        cxx, torch_dir = find_cxx(), find_torch()
        sets, missing = instruction_sets(cxx)
    except MissingError as error:
        return {"cpu": str(error), "cuda": f"needs the C++ part: {error}"}
    report = {"cpu": None, "cpu_sets": " ".join(sets), "cpu_sets_missing": missing}
    link_flags = [f"-L{torch_dir / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    try:
        nvcc, archs = find_nvcc(), cuda_archs()
        jobs = [*cuda_jobs(nvcc, archs, objects), *cpu_jobs(cxx, sets, torch_dir, objects, with_cuda=True)]
        # nvcc links, because it knows where its static runtime lies; that runtime loads where there is no driver.
        # Its symbols stay inside the library: torch brings a CUDA runtime of its own.
        hide = ["-Xlinker", "--exclude-libs,ALL"]
        run_compiler([nvcc, "-shared", "-cudart", "static", *hide, *compile_all(jobs), "-o", str(target), *link_flags])
        return {**report, "cuda": None, "cuda_archs": " ".join(f"sm_{arch}" for arch in archs)}
    except MissingError as error:
        cuda_missing = str(error)
    try:
        linked = compile_all(cpu_jobs(cxx, sets, torch_dir, objects, with_cuda=False))
        run_compiler([*cxx, "-shared", *linked, "-o", str(target), *link_flags])
    except MissingError as error:
        return {"cpu": str(error), "cuda": cuda_missing}
    return {**report, "cuda": cuda_missing}


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
    """build_ext for both libraries: says what is missing, leaves a report beside the kernels, and fails for nothing but
    a wrong request."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.rpartition(".")[2] == INDEX.rpartition(".")[2]:
            return super().get_ext_filename(fullname)  # which names the Python that it was compiled for
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def run(self) -> None:
        self.report: dict[str, str | None] = {}
        named_archs()  # here, because what build_extension raises leaves out an optional extension and no more
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
            what = {"cpu": "cpu_sets", "cuda": "cuda_archs"}.get(part)
            if what and not self.report[part]:
                state += f" for {self.report[what]}"
            print(f"megatron-lite: {name}: {state}", file=sys.stderr)
        if self.report.get("cpu_sets_missing"):
            print(f"megatron-lite: no CPU kernels for {self.report['cpu_sets_missing']}", file=sys.stderr)
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


# Folders of the checkout that commands read: where they are in the package (megatron_lite/config/shipped.py).
SHIPPED = {"megatron_lite._shipped.configs.clusters": "configs/clusters", "megatron_lite._shipped.launch": "launch"}

setup(
    packages=[*find_packages(include=["megatron_lite", "megatron_lite.*"]), *triton_packages(), *SHIPPED],
    package_dir={"megatron_lite": "megatron_lite", "megatron_lite._csrc": "csrc", **SHIPPED},
    package_data={
        "megatron_lite": ["py.typed", "report/page.css", "report/page.js"],
        "megatron_lite._shipped.configs.clusters": ["*.yaml"],
        "megatron_lite._shipped.launch": ["**/*"],
    },
    include_package_data=False,  # what MANIFEST.in names is for the archive of sources
    ext_modules=[
        Extension(KERNELS, sources=["csrc/rms_norm/binding_cpu.cpp"], optional=True),
        Extension(INDEX, sources=["csrc/data/index.cpp"], optional=True),
    ],
    cmdclass={"build_ext": BuildNative},
    zip_safe=False,
)
