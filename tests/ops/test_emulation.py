"""The emulation of CUDA itself: what it computes, and that it notices what a GPU would not forgive."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ops.emulation import build
from tests.ops.oracle import ROOT

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))


@pytest.fixture(scope="module")
def library() -> Path:
    return build.build([build.EMULATION / "controls.cu", build.EMULATION / "cuda_emulation.cpp"])


def call(library: Path | str, name: str, order: int) -> tuple[int, torch.Tensor]:
    """The error code and out[64] of a function of controls.cu, whose in[64] is 1, 2, ..."""
    loaded = ctypes.CDLL(str(library))
    loaded.ml_emulation_order(order)
    values, out = torch.arange(1.0, 65.0), torch.full((64,), -1.0)
    code = getattr(loaded, name)(ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(out.data_ptr()))
    return code, out


@pytest.mark.parametrize("order", [0, 1, 2])
def test_right_kernels_are_right_in_every_order(library: Path, order: int) -> None:
    assert call(library, "control_sum", order)[1].tolist() == [2080.0] * 64
    assert call(library, "control_rounds", order)[1].tolist() == [3.0] * 64
    lanes = [list(range(first, first + 32)) for first in (1, 33)]
    expected = []
    for warp in lanes:
        for i, own in enumerate(warp):
            down, up = (warp[i + 3] if i + 3 < 32 else own), (warp[i - 2] if i >= 2 else own)
            shuffled = warp[i ^ 5] + 2 * down + 4 * up + 8 * warp[i // 16 * 16 + 7]
            expected.append(shuffled + (1000 if warp[0] == 1 else 0) + 2080)
    assert call(library, "control_shuffles", order)[1].tolist() == expected


@pytest.mark.parametrize("name", ["control_sum_without_barrier", "control_rounds_without_barrier"])
def test_a_missing_barrier_is_a_wrong_number_in_some_order(library: Path, name: str) -> None:
    right = call(library, name.removesuffix("_without_barrier"), 0)[1]
    results = [call(library, name, order)[1] for order in (0, 1)]
    assert not all(torch.equal(result, right) for result in results)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("control_early_return", "thread 3 has ended, and thread 0 waits for all"),
        ("control_two_barriers", "one thread waits here"),
        ("control_missing_lane", "lanes of the warp do not come here"),
        ("control_writes_behind", "a write behind the dynamic shared memory"),
    ],
)
def test_a_kernel_that_would_hang_or_corrupt_ends_the_process(library: Path, name: str, message: str) -> None:
    code = "import sys; from tests.ops.test_emulation import call; call(*sys.argv[1:], 0)"
    command = [sys.executable, "-c", code, str(library), name]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.returncode != 0 and message in result.stderr


def test_a_launch_that_no_gpu_takes_is_an_error_code(library: Path) -> None:
    code, out = call(library, "control_too_much_shared_memory", 0)
    assert code != 0 and out.tolist() == [-1.0] * 64
