"""The native build: what an install does without compilers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.ops.oracle import ROOT


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


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_a_failing_nvcc_costs_only_the_cuda_kernels(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'nvcc fatal: unsupported host compiler' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    output, report, folder = build(tmp_path, NVCC=str(nvcc), PATH=os.environ["PATH"])
    assert "CPU kernels: built" in output
    assert "CUDA C++ kernels: left out: nvcc failed: nvcc fatal: unsupported host compiler" in output
    assert report["cpu"] is None and report["index"] is None
    assert (folder / "_native.so").exists()
    (index,) = (folder / "../data").glob("_index*")
    assert index.name == "_index" + sysconfig.get_config_var("EXT_SUFFIX")  # it serves this Python alone
