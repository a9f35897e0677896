"""The emulation of tensor cores and of asynchronous copies (common/mma.cuh), by itself."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.ops.emulation import build

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))


@pytest.fixture(scope="module")
def library() -> Path:
    return build.build([build.EMULATION / "mma_controls.cu", build.EMULATION / "cuda_emulation.cpp"])


def call(library: Path, name: str, *tensors: Tensor) -> None:
    function = getattr(ctypes.CDLL(str(library)), name)
    assert function(*(ctypes.c_void_p(t.data_ptr()) for t in tensors)) == 0


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_warp_multiplies_matrices(library: Path, name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b = torch.randint(-8, 9, (16, 16)).to(dtype), torch.randint(-8, 9, (16, 8)).to(dtype)  # sums are exact
    out = torch.full((2, 16, 8), -1.0)
    call(library, f"control_product_{name}", a, b, b.T.contiguous(), out)
    expected = a.double() @ b.double()
    assert torch.equal(out[0].double(), expected) and torch.equal(out[1].double(), expected)
    assert not torch.equal(expected, (a.T.double() @ b.double()))


def test_a_copy_is_there_when_it_was_waited_for_and_not_before(library: Path) -> None:
    values, out = torch.arange(1.0, 65.0), torch.full((64,), -1.0)
    call(library, "control_all_arrived", values, out)
    values[40] = 0.0  # which the kernel says does not exist
    assert torch.equal(out, values)
    call(library, "control_one_arrived", values, out)
    assert torch.equal(out[:32], values[:32]) and out[32:].isnan().all()
