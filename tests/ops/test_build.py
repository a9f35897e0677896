"""The native build: what an install does without compilers, or with old ones, and what it compiles for."""

from __future__ import annotations

import json
import os
import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import setuptools

from megatron_lite.ops import native
from tests.ops.oracle import ROOT, run_python

needs_x86 = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() not in ("x86_64", "AMD64"), reason="g++ for x86 is not installed"
)


def build(tmp_path: Path, **environment: str) -> tuple[str, dict[str, str | None], Path]:
    """Runs setup.py build_ext into tmp_path with this environment alone; returns its output, report and folder."""
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "-b", str(tmp_path / "lib"), "-t", str(tmp_path / "objects")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"HOME": os.environ.get("HOME", "/"), "CUDA_HOME": "/nowhere", **environment},
        timeout=600,  # two minutes of compiling, on two cores that may be busy
    )
    assert result.returncode == 0, result.stdout + result.stderr
    folder = tmp_path / "lib/megatron_lite/ops"
    return result.stdout + result.stderr, json.loads((folder / "_native_build.json").read_text()), folder


def test_install_without_a_compiler_succeeds_and_says_so(tmp_path: Path) -> None:
    output, report, folder = build(tmp_path, CXX="/nowhere/g++", NVCC="/nowhere/nvcc", PATH="/nowhere")
    assert "CPU kernels: left out: the C++ compiler CXX=/nowhere/g++ is not there" in output
    assert "CUDA C++ kernels: left out" in output
    assert "C++ index of the data: left out: the C++ compiler CXX=/nowhere/g++ is not there" in output
    assert report["cpu"] and report["cuda"] and report["index"]
    assert not (folder / "_native.so").exists() and not list((folder / "../data").glob("_index*"))


REFUSING_CXX = """#!/bin/sh
case " $* " in *" {flag} "*) echo "g++: error: unrecognized command-line option '{flag}'" >&2; exit 1 ;; esac
exec {cxx} "$@"
"""


def script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def refusing(tmp_path: Path, flag: str) -> str:
    """A C++ compiler that does not know this flag."""
    return script(tmp_path / "g++", REFUSING_CXX.format(flag=flag, cxx=shutil.which("g++")))


def setup_functions(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py defines."""
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    return runpy.run_path(str(ROOT / "setup.py"))


LOAD = """
import json, sys, torch
torch.ops.load_library(sys.argv[1])
x, weight = torch.randn(3, 40).bfloat16(), torch.ones(40).bfloat16()
best = torch.ops.megatron_lite_cpu.rms_norm(x, weight, 1e-5)[0].float()
plain = torch.nn.functional.rms_norm(x.float(), (40,))
print(json.dumps([torch.ops.megatron_lite_cpu.instruction_set(), (best - plain).abs().max().item()]))
"""


@needs_x86
def test_a_failing_nvcc_and_a_missing_instruction_set_cost_no_more(tmp_path: Path) -> None:
    nvcc = script(tmp_path / "nvcc", "#!/bin/sh\necho 'nvcc fatal: unsupported host compiler' >&2\nexit 1\n")
    cxx = refusing(tmp_path, "-mavx512bf16")
    output, report, folder = build(tmp_path, NVCC=nvcc, CXX=cxx, PATH=os.environ["PATH"])
    assert "CPU kernels: built for portable avx2 avx512\n" in output
    assert "no CPU kernels for avx512bf16: g++ failed: g++: error: unrecognized command-line option" in output
    assert "CUDA C++ kernels: left out: nvcc failed: nvcc fatal: unsupported host compiler" in output
    assert report["cpu"] is None and report["index"] is None and report["cpu_sets"] == "portable avx2 avx512"
    assert str(report["cpu_sets_missing"]).startswith("avx512bf16: ")
    best, error = json.loads(run_python("-c", LOAD, str(folder / "_native.so")))
    assert best <= 2 and error < 0.05
    (index,) = (folder / "../data").glob("_index*")
    assert index.name == "_index" + sysconfig.get_config_var("EXT_SUFFIX")  # it serves this Python alone


@needs_x86
@pytest.mark.parametrize(
    ("flag", "sets"),
    [
        ("-mno-such-flag", ["portable", "avx2", "avx512", "avx512bf16"]),
        ("-mavx512bf16", ["portable", "avx2", "avx512"]),
        ("-mavx512dq", ["portable", "avx2"]),
        ("-mavx2", ["portable"]),  # without it nothing is built on it
    ],
)
def test_the_sets_that_a_compiler_has(
    flag: str, sets: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, missing = setup_functions(monkeypatch)["instruction_sets"]([refusing(tmp_path, flag)])
    assert found == sets and (missing is None) == (len(sets) == 4)
    # The header must pick a set that is there, whatever this CPU has.
    program = """
        #include "common/instruction_set.h"
        #include <cstdio>
        namespace ml { const int op_portable = 0; %s }
        int main() {
          for (int isa = -1; isa < 4; ++isa) {
            int set = ML_KERNELS_WITH_BF16(op, isa);
            if (set != ml::instruction_set(isa) || set > %d) return 1;
          }
          return 0;
        }"""
    defined = "".join(f"const int op_{isa} = {i};" for i, isa in enumerate(sets) if i)
    (tmp_path / "main.cpp").write_text(program % (defined, len(sets) - 1))
    defines = [f"-DML_WITH_{isa.upper()}" for isa in sets]
    command = ["g++", "-std=c++20", *defines, "-I", str(ROOT / "csrc"), "main.cpp", "-o", "main"]
    subprocess.run(command, check=True, cwd=tmp_path)
    subprocess.run([str(tmp_path / "main")], check=True)


@pytest.mark.parametrize(
    ("gpus", "named", "archs"),
    [
        ("", None, [80, 90]),
        ("exit 9", None, [80, 90]),  # a driver that is not there
        ("echo 9.0; echo 9.0", None, [90]),
        ("echo 8.6; echo 12.0", None, [80, 90]),
        ("echo 7.5", None, [80, 90]),  # too old for the kernels
        ("echo 9.0", "80, 100", [80, 100]),
    ],
)
def test_the_gpus_that_are_compiled_for(
    gpus: str, named: str | None, archs: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions = setup_functions(monkeypatch)
    script(tmp_path / "nvidia-smi", f"#!/bin/sh\n{gpus}\n")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv(functions["CUDA_ARCHS_VARIABLE"], named or "")
    assert functions["cuda_archs"]() == archs
    flags = functions["arch_flags"](archs)
    assert flags[-1] == f"arch=compute_{archs[-1]},code=[sm_{archs[-1]},compute_{archs[-1]}]"
    assert [f"code=sm_{arch}" in " ".join(flags) for arch in archs[:-1]] == [True] * (len(archs) - 1)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("80 9.0+PTX", "MEGATRON_LITE_CUDA_ARCHS takes compute capabilities from 80, as in '80 90'; it has '9.0+PTX'"),
        ("90a", "it has '90a'"),
        ("80,83", "MEGATRON_LITE_CUDA_ARCHS has '83'; {nvcc} compiles for 80, 90"),
    ],
)
def test_a_wrong_capability_ends_the_install(named: str, message: str, tmp_path: Path) -> None:
    """It is a request: without it everything could be built, and nobody would see what is missing."""
    nvcc = script(tmp_path / "nvcc", "#!/bin/sh\necho sm_80; echo sm_90\n")
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "-b", str(tmp_path / "lib"), "-t", str(tmp_path / "objects")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"CXX": "/nowhere/g++", "NVCC": nvcc, "PATH": "/nowhere", "MEGATRON_LITE_CUDA_ARCHS": named},
        timeout=120,
    )
    assert result.returncode == 1 and not (tmp_path / "lib").exists()
    assert result.stderr.strip().splitlines()[-1].startswith("error: "), result.stderr
    assert message.format(nvcc=nvcc) in result.stderr


@pytest.mark.parametrize(
    ("built", "gpu", "runs"),
    [
        ("sm_90", (9, 0), True),
        ("sm_90", (8, 0), False),
        ("sm_90", (12, 0), True),  # by the PTX
        ("sm_80", (8, 6), True),
        ("sm_80 sm_100", (9, 0), False),  # neither an older GPU's machine code nor a newer one's PTX
        ("sm_80 sm_100", (8, 9), True),
        ("sm_86", (8, 0), False),
        ("sm_86 sm_90", (8, 0), False),
        (None, (8, 0), True),  # a library that does not say
    ],
)
def test_a_gpu_that_the_library_has_no_code_for(
    built: str | None, gpu: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "missing_cpu", lambda: None)
    monkeypatch.setattr(native, "build_report", lambda: {"cuda": None, "cuda_archs": built})
    monkeypatch.setattr(native.torch.ops.megatron_lite_cuda, "rms_norm", None, raising=False)
    monkeypatch.setattr(native.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(native.torch.cuda, "get_device_capability", lambda: gpu)
    missing = native.missing_cuda.__wrapped__()
    assert (missing is None) == runs
    if missing is not None:
        assert f"built for {built} and the GPU has compute capability {gpu[0]}.{gpu[1]}" in missing
        archs = missing.partition('MEGATRON_LITE_CUDA_ARCHS="')[2].partition('"')[0].split()
        assert f"{gpu[0]}{gpu[1]}" in archs and str(built).replace("sm_", "").split()[-1] in archs


def test_the_longest_files_are_begun_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On every core at once: the files of the CPU kernels follow those of CUDA without a pause."""
    functions = setup_functions(monkeypatch)
    begun: list[str] = []
    monkeypatch.setitem(functions["compile_all"].__globals__, "run_compiler", lambda command: begun.append(command[-1]))
    sets = ["portable", "avx2", "avx512", "avx512bf16"]
    jobs = functions["cpu_jobs"](["g++"], sets, Path("/torch"), tmp_path, True)
    jobs += functions["cuda_jobs"]("nvcc", [80, 90], tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    objects = functions["compile_all"](jobs)
    assert [Path(path).name for path in begun] == [Path(path).name for path in objects]
    names = [Path(path).name for path in objects]
    assert names[:2] == ["attention_cuda_backward.o", "attention_cuda_forward.o"]
    assert names.index("layer_norm_cuda.o") < names.index("adamw_cuda.o") < names.index("attention_cpu_portable.o")
    assert names.index("attention_cpu_portable.o") < names.index("adamw_cpu_portable.o")


@pytest.mark.parametrize(("cores", "num_archs"), [(1, 2), (2, 2), (3, 2), (2, 4)])
def test_compilers_have_no_more_threads_than_there_are_cores(
    cores: int, num_archs: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    functions = setup_functions(monkeypatch)
    lock, running, most = threading.Lock(), 0, 0

    def compiler(command: list[str]) -> None:
        nonlocal running, most
        threads = int(command[command.index("--threads") + 1]) if "--threads" in command else 1
        with lock:
            running += threads
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= threads

    monkeypatch.setitem(functions["compile_all"].__globals__, "run_compiler", compiler)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    jobs = functions["cuda_jobs"]("nvcc", [80, 90, 100, 120][:num_archs], tmp_path)
    assert len(jobs) > 2
    jobs += functions["cpu_jobs"](["g++"], ["portable"], Path("/torch"), tmp_path, True)
    assert len(functions["compile_all"](jobs)) == len(jobs)
    assert most == cores


def test_the_archive_of_sources_has_all_of_them(tmp_path: Path) -> None:
    """And what is installed has none that are compiled."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "megatron_lite").mkdir()
    shutil.copy(ROOT / "megatron_lite/__init__.py", tmp_path / "megatron_lite")
    for folder in ("configs", "launch"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    command = [sys.executable, "setup.py", "-q", "sdist", "build_py", "-d", "installed"]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=120, capture_output=True)
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        found = {name.partition("/")[2] for name in packed.getnames()}
    sources = {str(path.relative_to(tmp_path)) for path in (tmp_path / "csrc").rglob("*") if path.is_file()}
    assert len(sources) > 50 and sources <= found, sources - found
    installed = [path for path in (tmp_path / "installed").rglob("*") if path.is_file()]
    assert {path.suffix for path in installed} == {".py", ".yaml", ".sh", ".sbatch", ".example"}
