"""Which implementation of an op runs, and why.

Every op has a table row: its backends from fastest to slowest as measured, each with the devices and dtypes it covers
and a check of whether it is there. `auto` takes the first that can run; the last one, the reference, always can. A
backend that is asked for by name and cannot run raises; `auto` passing over a kernel that is missing is logged once.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from megatron_lite.ops import native

_FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})
_ALL_FLOATS = _FLOATS | {torch.float64}
_FP32 = frozenset({torch.float32})

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """One implementation of an op. `missing` says why it cannot run on this machine, with the remedy, or None.

    `is_extra`: somebody else's, which most do without; `auto` passes over it in silence. `exception`: for which calls
    `auto` takes another one although this one is chosen, in words; the op itself decides it, by what the table lacks.
    """

    name: str
    dtypes: frozenset[torch.dtype]
    devices: frozenset[str] | None  # device types; None: any
    missing: Callable[[], str | None]
    is_extra: bool = False
    exception: str = ""


@dataclass(frozen=True)
class Choice:
    """The backend that runs, and why it and none before it in the table."""

    backend: str
    reason: str


def _always() -> str | None:
    return None


_CPU, _GPU = frozenset({"cpu"}), frozenset({"cuda"})
_NATIVE_CPU = Backend("cpu", _FLOATS, _CPU, native.missing_cpu)
_CUDA = Backend("cuda", _FLOATS, _GPU, native.missing_cuda)
_CUDA_HALVES = Backend("cuda", frozenset({torch.bfloat16, torch.float16}), _GPU, native.missing_cuda)
_TRITON = Backend("triton", _FLOATS, _GPU, native.missing_triton)
_APEX = Backend("apex", _FLOATS, _GPU, native.missing_apex_norms, is_extra=True)
_TORCH = Backend("torch", _ALL_FLOATS, None, _always)
_REFERENCE = Backend("reference", _ALL_FLOATS, None, _always)

# Fewer queries than this are the business of torch's kernel on a CPU: ours lays all keys out anew for each call.
FEW_QUERIES = 8
_CPU_ATTENTION = replace(_NATIVE_CPU, exception=f"fewer than {FEW_QUERIES} queries: sdpa")

# On the CPU as measured (docs/performance.md). No GPU has been measured: there PyTorch's kernel comes first where it is
# fused, and ours where it is not.
BACKENDS: Mapping[str, tuple[Backend, ...]] = {
    "rms_norm": (_CUDA, _TRITON, _APEX, _NATIVE_CPU, _REFERENCE),
    "layer_norm": (_NATIVE_CPU, _TORCH, _CUDA, _TRITON, _APEX, _REFERENCE),
    "rotary": (_CUDA, _TRITON, _NATIVE_CPU, _REFERENCE),
    "swiglu": (_CUDA, _TRITON, _NATIVE_CPU, _REFERENCE),
    "gelu": (_NATIVE_CPU, _TORCH, _CUDA, _TRITON, _REFERENCE),
    "attention": (_CPU_ATTENTION, Backend("sdpa", _ALL_FLOATS, None, _always), _TRITON, _CUDA_HALVES, _REFERENCE),
    # With slopes or the log-sum-exp, which torch's kernels do not have.
    "attention_lse": (_NATIVE_CPU, _TRITON, _CUDA_HALVES, _REFERENCE),
    "cross_entropy": (_CUDA, _TRITON, _NATIVE_CPU, _REFERENCE),
    # On CUDA by what is moved: ours reads and writes 30 bytes an element (fp32, to bf16 parameters); PyTorch's and
    # apex's need a pass for the clip factor and one for the parameters, 42 bytes.
    "adamw": (
        Backend("cuda", _FP32, _GPU, native.missing_cuda),
        Backend("triton", _FP32, _GPU, native.missing_triton),
        Backend("cpu", _FP32, _CPU, native.missing_cpu),
        _TORCH,
        Backend("apex", _FP32, _GPU, native.missing_apex_adam, is_extra=True),
        _REFERENCE,
    ),
    # On CUDA PyTorch's own addition takes both dtypes in one pass: there is nothing to gain.
    "accumulate": (_NATIVE_CPU, _REFERENCE),
    "block_squares": (_CUDA, _TRITON, _NATIVE_CPU, _REFERENCE),
    # On CUDA the reference: it sums one number of 256, and never waits for the device.
    "exact_sum": (Backend("cpu", frozenset({torch.float64}), _CPU, native.missing_cpu), _REFERENCE),
}


def _obstacle(backend: Backend, dtype: torch.dtype, device: str) -> str | None:
    """Why `backend` cannot take a `dtype` tensor on a `device`, or None."""
    if backend.devices is not None and device not in backend.devices:
        return f"it runs on {'/'.join(sorted(backend.devices))}, not on {device}"
    if dtype not in backend.dtypes:
        return f"it takes {', '.join(sorted(str(d) for d in backend.dtypes))}, not {dtype}"
    return backend.missing()


def select(op: str, requested: str, dtype: torch.dtype, device: str) -> Choice:
    """The implementation of `op` that runs for `dtype` tensors on a device of type `device` ('cpu', 'cuda', ...).

    Raises ValueError when `requested` is no backend of the op, or is one that cannot run here: the message says which
    can, or what to install.
    """
    return _select(op, requested, dtype, device)


# torch.compile then runs it instead of tracing it. This is all that torch.compiler.assume_constant_result does, after
# importing the whole compiler: seconds of start-up and 100 MB in every process.
select._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _select(op: str, requested: str, dtype: torch.dtype, device: str) -> Choice:
    assert op in BACKENDS, f"unknown op {op!r}"
    candidates = BACKENDS[op]
    if requested != "auto":
        return _by_name(op, requested, dtype, device)
    choice = _fastest(op, dtype, device)
    for backend in candidates[: [backend.name for backend in candidates].index(choice.backend)]:
        # Covering the device and dtype and yet missing is what a user would want to know; the rest is by design.
        covers = (backend.devices is None or device in backend.devices) and dtype in backend.dtypes
        if covers and not backend.is_extra:
            _log_fallback(op, backend.name, str(_obstacle(backend, dtype, device)))
    return choice


def first_reason(device: str) -> str:
    """Why the first row of an op's table is the first."""
    return "the fastest as measured" if device == "cpu" else f"the first choice for {device}, not yet measured"


def _fastest(op: str, dtype: torch.dtype, device: str) -> Choice:
    """What `auto` stands for."""
    passed_over: list[str] = []
    for backend in BACKENDS[op]:
        obstacle = _obstacle(backend, dtype, device)
        if obstacle is None:
            return Choice(backend.name, "; ".join(passed_over) or first_reason(device))
        passed_over.append(f"not {backend.name}: {obstacle}")
    raise AssertionError(f"{op}: no backend takes {dtype} on {device}")


def _by_name(op: str, requested: str, dtype: torch.dtype, device: str) -> Choice:
    by_name = {backend.name: backend for backend in BACKENDS[op]}
    if requested not in by_name:
        raise ValueError(f"kernels.{op}={requested}: no such backend; one of auto, {', '.join(by_name)}")
    obstacle = _obstacle(by_name[requested], dtype, device)
    if obstacle is not None:
        usable = [name for name, backend in by_name.items() if _obstacle(backend, dtype, device) is None]
        raise ValueError(
            f"kernels.{op}={requested} cannot run for {dtype} on {device}: {obstacle}. "
            f"Usable here: auto, {', '.join(usable)}"
        )
    return Choice(requested, "asked for by name")


@functools.cache
def _log_fallback(op: str, backend: str, obstacle: str) -> None:
    logger.warning("%s: the %s kernel is not used: %s", op, backend, obstacle)


@dataclass(frozen=True)
class Explanation:
    """One line of the table that `explain` returns."""

    op: str
    dtype: torch.dtype
    device: str
    choice: Choice
    obstacles: Mapping[str, str]  # backend -> why it cannot run here


def explain(op: str, dtype: torch.dtype, device: str) -> Explanation:
    """What `auto` runs for `op`, `dtype` and `device`, and why each other backend would not run. Logs nothing."""
    obstacles = {backend.name: _obstacle(backend, dtype, device) for backend in BACKENDS[op]}
    reasons = {name: why for name, why in obstacles.items() if why}
    return Explanation(op, dtype, device, _fastest(op, dtype, device), reasons)


def table(device: str) -> list[Explanation]:
    """`explain` for every op and float dtype on devices of this type, for a listing."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return [explain(op, dtype, device) for op in BACKENDS for dtype in dtypes]
