"""How the CUDA kernels of the norms reach memory, which no number shows."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest

from tests.ops.emulation import build
from tests.ops.oracle import ROOT

needs_nvcc = pytest.mark.skipif(build.NVCC is None, reason="nvcc is not installed")
pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))


@pytest.fixture(scope="module")
def launcher() -> ctypes.CDLL:
    library = build.build([build.EMULATION / "norm_controls.cu", build.EMULATION / "cuda_emulation.cpp"])
    loaded = ctypes.CDLL(str(library))
    for function in (loaded.numbers_an_access, loaded.is_read_once):
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_bool]
    loaded.is_read_once.restype = ctypes.c_bool
    return loaded


@pytest.mark.parametrize("bytes_of", [2, 4])
@pytest.mark.parametrize("dim", [64, 4096, 6144, 6152, 8192, 12_288, 12_296, 16_384, 65_536])
def test_a_row_of_any_length_is_read_16_bytes_at_a_time(launcher: ctypes.CDLL, bytes_of: int, dim: int) -> None:
    assert launcher.numbers_an_access(bytes_of, dim, True) * bytes_of == 16
    assert launcher.numbers_an_access(bytes_of, dim, False) == 1, "control: a row that lies on no such boundary"
    assert launcher.numbers_an_access(bytes_of, dim + 1, True) == 1, "control: nor do the rows behind it"
    assert launcher.is_read_once(bytes_of, dim, True) == (dim * bytes_of <= 24 * 1024)


@needs_nvcc
@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
def test_the_kernels_for_wide_rows_move_16_bytes_at_a_time(op: str, tmp_path: Path) -> None:
    """In bf16, where a number on its own would be an access of 16 bits, as it is in the kernels for one at a time."""
    target = tmp_path / "kernels.ptx"
    command = [str(build.NVCC), "-std=c++17", "-O3", "-arch=compute_80", f"-I{ROOT / 'csrc'}", "-ptx"]
    subprocess.run([*command, str(ROOT / f"csrc/{op}/cuda.cu"), "-o", str(target)], check=True, timeout=600)
    wide = []
    for kernel in target.read_text().split(".entry ")[1:]:
        name = kernel.partition("(")[0]
        match = re.search(r"norm_(forward|backward)_anyI13__nv_bfloat16\w*?Li(\d+)E", name)
        if match is None:
            continue
        wide.append(match[2])
        has_single = re.search(r"(ld|st)\.global(\.nc)?\.[ub]16", kernel) is not None
        assert has_single == (match[2] == "1"), name
        if not has_single:
            assert re.search(r"ld\.global(\.nc)?\.v4", kernel) and re.search(r"st\.global\.v4", kernel), name
    assert sorted(wide) == ["1"] * 8 + ["8"] * 8  # forward and backward, two formats of the weight, addition or none
