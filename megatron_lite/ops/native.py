"""The compiled kernels: one shared library next to this file, built from csrc/ by setup.py.

The library targets torch's stable ABI, so one build serves several Python and torch versions. Whatever part of it is
missing has a reason, which setup.py wrote down when it built (or could not build) the package.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

LIBRARY = Path(__file__).with_name("_native.so")
BUILD_REPORT = Path(__file__).with_name("_native_build.json")

# By the numbers of csrc/common/instruction_set.h.
_INSTRUCTION_SETS = ("portable", "AVX2", "AVX-512", "AVX-512 with bf16 products")

_REBUILD = "then reinstall with `pip install -e . --no-build-isolation`"

_FAKE_MODE = torch._C._TorchDispatchModeKey.FAKE

_OPERATORS = torch.library.Library("megatron_lite", "FRAGMENT")  # registrations last as long as this object


def define_operator(
    schema: str,
    dispatch_key: str,
    kernel: Callable,
    fake: Callable,
    gradient: Callable | None = None,
    setup_context: Callable | None = None,
) -> None:
    """Defines megatron_lite::<schema>, run by `kernel` on devices of `dispatch_key` and by `fake` for shapes alone.

    `gradient` and `setup_context` are those of torch.library.register_autograd. Without them, asking for a gradient
    raises: torch alone would return none and go on.
    """
    name = schema.partition("(")[0]
    _OPERATORS.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _OPERATORS.impl(name, kernel, dispatch_key)
    torch.library.register_fake(f"megatron_lite::{name}", fake, lib=_OPERATORS)

    def refuse(ctx: Any, *d_outputs: torch.Tensor) -> None:
        raise NotImplementedError(f"megatron_lite::{name} has no gradient; use the reference for second derivatives")

    torch.library.register_autograd(
        f"megatron_lite::{name}", gradient or refuse, setup_context=setup_context, lib=_OPERATORS
    )


def define_in_place_operator(schema: str, dispatch_key: str, kernel: Callable[..., None]) -> None:
    """Defines megatron_lite::<schema>, which writes to arguments of its own, returns nothing and has no gradient.

    Autograd counts the versions of what the schema says is written.
    """
    name = schema.partition("(")[0]
    _OPERATORS.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    parameters = getattr(torch.ops.megatron_lite, name).default._schema.arguments
    aliases = [parameter.alias_info for parameter in parameters]
    written = [i for i, alias in enumerate(aliases) if alias is not None and alias.is_write]

    def counted(*arguments: Any) -> None:
        kernel(*arguments)
        torch.autograd.graph.increment_version([arguments[i] for i in written if arguments[i] is not None])

    _OPERATORS.impl(name, counted, dispatch_key)
    torch.library.register_fake(f"megatron_lite::{name}", lambda *arguments: None, lib=_OPERATORS)


@functools.cache
def build_report() -> dict[str, str | None]:
    """What setup.py wrote down: 'cpu', 'cuda' and 'index' with None, or why the part is missing; empty if unbuilt.

    Of parts that were built: 'cpu_sets', the instruction sets ("portable avx2"); 'cpu_sets_missing', the first that the
    compiler cannot compile for and what it said, or None; 'cuda_archs' ("sm_80 sm_90").
    """
    if not BUILD_REPORT.exists():
        return {}
    return json.loads(BUILD_REPORT.read_text(encoding="utf-8"))


def is_traced() -> bool:
    """Whether tensors have shapes and no numbers to look at: under torch.compile, or in FakeTensorMode."""
    return torch.compiler.is_compiling() or torch._C._get_dispatch_mode(_FAKE_MODE) is not None


def runs_bare() -> bool:
    """Whether a kernel may be called without the operator around it, which costs a small tensor more than the kernel:
    nobody asks for a gradient, and nobody traces."""
    return not (torch.is_grad_enabled() or is_traced())


@functools.cache
def missing_cpu() -> str | None:
    """Loads the native library. None when its CPU kernels are registered, else a sentence with reason and remedy."""
    if not LIBRARY.exists():
        reason = build_report().get("cpu") or "the package was not built"
        return f"the native library is not there ({reason}); install a C++20 compiler, {_REBUILD}"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"the native library does not load ({error}); it was built for another torch: {_REBUILD}"
    if not hasattr(torch.ops.megatron_lite_cpu, "instruction_set"):
        return f"the native library was built from older sources; {_REBUILD.removeprefix('then ')}"
    return None


@functools.cache
def missing_cuda() -> str | None:
    """As `missing_cpu`, for the CUDA C++ kernels."""
    if (missing := missing_cpu()) is not None:
        return missing
    if not hasattr(torch.ops.megatron_lite_cuda, "rms_norm"):
        reason = build_report().get("cuda") or "the library holds no CUDA kernels"
        return f"built without CUDA kernels ({reason}); install the CUDA toolkit (nvcc), {_REBUILD}"
    return _missing_gpu() or _missing_code()


@functools.cache
def missing_triton() -> str | None:
    """As `missing_cpu`, for the Triton kernels: they need the triton package and compute capability 8.0 or more."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported ({error}); `pip install triton`"
    return _missing_gpu()


@functools.cache
def missing_apex_norms() -> str | None:
    """As `missing_cpu`, for the fused norms of NVIDIA's apex, an extension that an install of apex may lack."""
    return _missing_apex("fused_layer_norm_cuda")


@functools.cache
def missing_apex_adam() -> str | None:
    """As `missing_cpu`, for apex's Adam, which is another of its extensions."""
    return _missing_apex("amp_C")


def _missing_apex(extension: str) -> str | None:
    for module in ("apex", extension):
        try:
            importlib.import_module(module)
        except ImportError as error:
            return (
                f"apex's kernels cannot be imported ({error}); install https://github.com/NVIDIA/apex with "
                "its C++ and CUDA extensions, or choose another backend"
            )
    return _missing_gpu()


def instruction_set() -> str:
    """The instruction set that the CPU kernels run with here: 'AVX-512' and so on. They have to be there."""
    assert missing_cpu() is None, missing_cpu()
    return _INSTRUCTION_SETS[torch.ops.megatron_lite_cpu.instruction_set()]


def _missing_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device; install a CUDA build of torch and a driver, or choose another backend"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the GPU has compute capability {major}.{minor}, the kernels need 8.0; choose another backend"
    return None


def _missing_code() -> str | None:
    """Machine code runs on GPUs of the same major capability that are not older; the PTX of the last architecture,
    which setup.py embeds, on every later one."""
    archs = [int(arch.removeprefix("sm_")) for arch in (build_report().get("cuda_archs") or "").split()]
    major, minor = torch.cuda.get_device_capability()
    here = 10 * major + minor
    same_major = [arch for arch in archs if arch // 10 == major]
    if not archs or here >= max(archs) or any(arch <= here for arch in same_major):
        return None
    named = " ".join(str(arch) for arch in sorted({*archs, here}))
    return (
        f"the CUDA kernels were built for {build_report()['cuda_archs']} and the GPU has compute capability "
        f'{major}.{minor}; set MEGATRON_LITE_CUDA_ARCHS="{named}", {_REBUILD}'
    )


def run_cuda(name: str, *arguments: Any) -> Any:
    """megatron_lite_cuda::<name> of the arguments and the current stream, on the device of the first argument."""
    with torch.cuda.device(arguments[0].device):
        return getattr(torch.ops.megatron_lite_cuda, name)(*arguments, torch.cuda.current_stream().cuda_stream)


def run_triton(op: str, function: str, *arguments: Any) -> Any:
    """A function of csrc/<op>/triton.py, on the device of the first argument."""
    with torch.cuda.device(arguments[0].device):
        return getattr(triton_kernels(op), function)(*arguments)


@functools.cache
def triton_kernels(op: str) -> ModuleType:
    """csrc/<op>/triton.py, which is installed as `megatron_lite._csrc.<op>.triton`."""
    return importlib.import_module(f"megatron_lite._csrc.{op}.triton")
