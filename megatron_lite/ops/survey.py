"""What there is on this machine for the kernels to run on, in words. For `megatron-lite doctor`."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess

import torch

from megatron_lite.ops import native


def environment() -> dict[str, str]:
    """What is installed and built: name -> what it is, or why it is not there."""
    cpu = native.missing_cpu()
    return {
        "Python": platform.python_version(),
        "torch": f"{torch.__version__}, {_torch_cuda()}",
        "NCCL": _nccl(),
        "C++ compiler": _compiler("c++", "g++", "clang++"),
        "CUDA compiler": _compiler("nvcc"),
        "CPU": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "CPU kernels": cpu or f"{_built('cpu_sets')}; they run with {native.instruction_set()}{_left_out()}",
        "CUDA C++ kernels": native.missing_cuda() or _built("cuda_archs"),
        "Triton": _version("triton") + (f"; unused: {missing}" if (missing := native.missing_triton()) else ""),
        "apex": native.missing_apex_norms() or native.missing_apex_adam() or "usable",
        "data index": native.build_report().get("index") or "built",
        "GPU": _gpus(),
    }


def lacking() -> dict[str, str]:
    """Of what every run uses, what is not there: name -> why, and what to do."""
    missing = {"CPU kernels": native.missing_cpu(), "data index": native.build_report().get("index")}
    return {name: why for name, why in missing.items() if why}


def defects() -> list[str]:
    """What should be mended: a library that does not load, a GPU whose kernels are not there."""
    found = []
    cpu, cuda = native.missing_cpu(), native.missing_cuda()
    if cpu is not None and native.LIBRARY.exists():
        found.append(cpu)
    if torch.cuda.is_available():
        found += [f"there is a GPU, and yet: {missing}" for missing in (cuda, native.missing_triton()) if missing]
    return found


def _built(targets: str) -> str:
    known = native.build_report().get(targets)
    return f"built for {known}" if known else "built"


def _left_out() -> str:
    missing = native.build_report().get("cpu_sets_missing")
    return f"; the compiler had none for {missing}" if missing else ""


def _torch_cuda() -> str:
    return f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"


def _nccl() -> str:
    return ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else "not in this torch"


def _compiler(*names: str) -> str:
    """The first of the commands that is there, with the line in which it names itself."""
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        return "none, which only building the kernels needs"
    try:
        said = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    lines = [line for line in said.splitlines() if any(letter.isdigit() for letter in line)]
    release = next((line for line in lines if "release" in line), lines[0] if lines else "does not say its version")
    return f"{found}, {release}"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch sees"
    count = torch.cuda.device_count()
    found = {f"{torch.cuda.get_device_name(i)} (sm_{_capability(i)})" for i in range(count)}
    return f"{count} x {', '.join(sorted(found))}"


def _capability(device: int) -> str:
    return "".join(map(str, torch.cuda.get_device_capability(device)))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
