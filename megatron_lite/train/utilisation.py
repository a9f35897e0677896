"""Model FLOPs utilisation: what the model needs, over what the devices could do in the same time."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from megatron_lite.config.peaks import gpu_peaks_tflops
from megatron_lite.distributed import collectives
from megatron_lite.distributed.mesh import Mesh
from megatron_lite.ops import checks

# A device that is not in the table is measured: matrices of this size, for this long. Long enough that processes
# which share cores get their share of them, short beside the start of a run.
MEASURED_SIZE = 512
MEASURED_S = 0.3


@dataclass(frozen=True)
class Peak:
    """FLOP/s that all devices of a run can reach together, in ``dtype``. source: 'data sheet' or 'measured matmul'."""

    device: str
    dtype: str
    source: str
    total_flops_per_s: float


def find_peak(mesh: Mesh, dtype: torch.dtype) -> Peak:
    """The peak of all ranks' devices in ``dtype``. Every rank calls it: unknown devices are measured all at once.

    For fp16 on CPUs it is that of fp32 where fp32 is faster: many CPUs have no products in fp16, what emulates them in
    a library is no bound for what kernels that compute in fp32 reach.
    """
    name, known = "CPU", None
    if mesh.device.type == "cuda":
        name = torch.cuda.get_device_name(mesh.device)
        listed = gpu_peaks_tflops(name).get(checks.short(dtype))
        known = None if listed is None else listed * 1e12
    everywhere = torch.tensor([known is not None], dtype=torch.int64, device=mesh.device)
    is_known = bool(collectives.all_reduce(everywhere, mesh.world, "min"))
    source = "data sheet" if is_known else "measured matmul"
    candidates = [dtype]
    if mesh.device.type == "cpu" and dtype == torch.float16:
        candidates.append(torch.float32)
    peaks = []
    for candidate in candidates:
        own = known if known is not None and is_known else _measure(mesh, candidate)
        total = collectives.all_reduce(torch.tensor([own], dtype=torch.float64, device=mesh.device), mesh.world)
        peaks.append(Peak(name, str(candidate).removeprefix("torch."), source, float(total)))
    return max(peaks, key=lambda peak: peak.total_flops_per_s)


def _measure(mesh: Mesh, dtype: torch.dtype) -> float:
    """FLOP/s of matrix products on this rank's device, while all other ranks do the same on theirs."""
    a = torch.ones(MEASURED_SIZE, MEASURED_SIZE, dtype=dtype, device=mesh.device)
    out = a @ a  # the first one sets up the library
    collectives.barrier(mesh.world)
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < MEASURED_S or count == 0:
        torch.mm(a, a, out=out)
        if mesh.device.type == "cuda":
            torch.cuda.synchronize(mesh.device)
        count += 1
    return count * 2 * MEASURED_SIZE**3 / elapsed
