from __future__ import annotations

import json
import logging

import pytest
import torch

from megatron_lite.ops import attention, dispatch, native, rms_norm
from tests.ops.oracle import run_python

needs_native = pytest.mark.skipif(native.missing_cpu() is not None, reason=str(native.missing_cpu()))
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so its backends do run")


def test_every_op_ends_in_a_reference_that_runs_anywhere() -> None:
    for op, backends in dispatch.BACKENDS.items():
        assert backends[-1].name == "reference"
        for device in ("cpu", "cuda", "meta"):
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                assert dispatch.select(op, "auto", dtype, device).reason
                assert dispatch.select(op, "reference", dtype, device).backend == "reference"


@needs_native
@pytest.mark.parametrize("op", ["rms_norm", "rotary", "swiglu"])
def test_auto_takes_the_compiled_kernel_on_the_cpu(op: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert dispatch.select(op, "auto", dtype, "cpu").backend == "cpu"
    choice = dispatch.select(op, "auto", torch.float64, "cpu")
    assert choice.backend == "reference" and "not torch.float64" in choice.reason


@needs_native
def test_the_named_backend_is_the_one_that_runs() -> None:
    """The operator's name in the autograd graph, not the table, says what ran."""
    x, weight = torch.randn(2, 8, requires_grad=True), torch.ones(8)
    assert "rms_norm_cpu" in str(rms_norm(x, weight, 1e-5).grad_fn.next_functions) or "rms_norm_cpu" in str(
        rms_norm(x, weight, 1e-5).grad_fn
    )
    assert "rms_norm_cpu" not in str(rms_norm(x, weight, 1e-5, backend="reference").grad_fn)


@needs_no_gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_backend_that_cannot_run_raises_with_the_remedy(backend: str) -> None:
    with pytest.raises(ValueError, match=rf"kernels.rms_norm={backend} cannot run .* on cpu: .*Usable here: auto"):
        rms_norm(torch.randn(2, 8), torch.ones(8), 1e-5, backend=backend)
    with pytest.raises(ValueError, match=r"(CUDA device|nvcc|Triton)"):
        dispatch.select("rms_norm", backend, torch.float32, "cuda")


def test_an_unknown_backend_raises_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"kernels\.attention=flash: no such backend; one of auto, cpu, sdpa"):
        attention(*(torch.randn(1, 2, 1, 8) for _ in range(3)), backend="flash")


def test_the_cpu_kernel_refuses_float64_by_name() -> None:
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        rms_norm(torch.randn(2, 8, dtype=torch.float64), torch.ones(8, dtype=torch.float64), 1e-5, backend="cpu")


@needs_no_gpu
def test_a_fallback_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._select.cache_clear()
    dispatch._log_fallback.cache_clear()
    with caplog.at_level(logging.WARNING, logger="megatron_lite"):
        for _ in range(3):
            for dtype in (torch.float32, torch.bfloat16):
                dispatch.select("rms_norm", "auto", dtype, "cuda")
    assert [r.getMessage().split(":")[1].split()[1] for r in caplog.records] == ["cuda", "triton"]


def test_no_fallback_is_logged_where_nothing_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._select.cache_clear()
    dispatch._log_fallback.cache_clear()
    with caplog.at_level(logging.WARNING, logger="megatron_lite"):
        dispatch.select("rms_norm", "auto", torch.float64, "cpu")
        dispatch.select("gelu", "auto", torch.float32, "cpu")
    assert caplog.records == []


def test_without_the_library_everything_runs_and_says_why() -> None:
    """What a user without a compiler gets: the reason of the build, the remedy, the reference, the same numbers."""
    code = """
import json, logging, pathlib, tempfile, torch
logging.basicConfig(format="%(message)s")
from megatron_lite.ops import native
folder = pathlib.Path(tempfile.mkdtemp())
native.LIBRARY, native.BUILD_REPORT = folder / "none.so", folder / "report.json"
native.BUILD_REPORT.write_text(json.dumps({"cpu": "no C++ compiler on PATH", "cuda": "no nvcc"}))
from megatron_lite.ops import rms_norm, rotary, swiglu
torch.manual_seed(0)
x = torch.randn(3, 8, requires_grad=True)
rms_norm(x, torch.ones(8), 1e-5).sum().backward()
swiglu(x).sum().backward()
rotary(torch.ones(1, 3, 1, 8), torch.ones(1, 3, 1, 8), torch.ones(1, 3, 4), torch.zeros(1, 3, 4))
try:
    rms_norm(x, torch.ones(8), 1e-5, backend="cpu")
except ValueError as error:
    print(json.dumps([str(error), x.grad.tolist()]))
"""
    message, gradient = json.loads(run_python("-c", code))
    assert "no C++ compiler on PATH" in message and "install a C++20 compiler" in message
    torch.manual_seed(0)
    x = torch.randn(3, 8, requires_grad=True)
    rms_norm(x, torch.ones(8), 1e-5).sum().backward()
    from megatron_lite.ops import swiglu

    swiglu(x).sum().backward()
    torch.testing.assert_close(torch.tensor(gradient), x.grad, rtol=1e-5, atol=1e-6)
