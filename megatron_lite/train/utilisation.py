"""Model FLOPs utilisation: what the model needs, over what the devices could do in the same time."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from megatron_lite.distributed import collectives
from megatron_lite.distributed.mesh import Mesh

# Dense peaks, FLOP/s, from NVIDIA's data sheets: bf16 on tensor cores, fp32 and fp64 without TF32. The first name that
# is part of the device's name counts, so the longer names come first.
GPU_PEAKS: tuple[tuple[str, dict[torch.dtype, float]], ...] = (
    ("B200", {torch.bfloat16: 2250e12, torch.float32: 75e12, torch.float64: 37e12}),
    ("GH200", {torch.bfloat16: 989.4e12, torch.float32: 67e12, torch.float64: 67e12}),
    ("H200", {torch.bfloat16: 989.4e12, torch.float32: 67e12, torch.float64: 67e12}),
    ("H100 PCIe", {torch.bfloat16: 756e12, torch.float32: 51e12, torch.float64: 51e12}),
    ("H100 NVL", {torch.bfloat16: 835e12, torch.float32: 60e12, torch.float64: 60e12}),
    ("H100", {torch.bfloat16: 989.4e12, torch.float32: 67e12, torch.float64: 67e12}),
    ("A100", {torch.bfloat16: 312e12, torch.float32: 19.5e12, torch.float64: 19.5e12}),
    ("L40S", {torch.bfloat16: 362e12, torch.float32: 91.6e12}),
    ("RTX 4090", {torch.bfloat16: 165.2e12, torch.float32: 82.6e12}),
    ("RTX 3090", {torch.bfloat16: 71e12, torch.float32: 35.6e12}),
)
# A device that is not in the table is measured: matrices of this size, for this long. Long enough that processes
# which share cores get their share of them, short beside the start of a run.
MEASURED_SIZE = 512
MEASURED_S = 0.3


@dataclass(frozen=True)
class Peak:
    """FLOP/s that all devices of a run can reach together. source: 'data sheet' or 'measured matmul'."""

    device: str
    dtype: str
    source: str
    total_flops_per_s: float


def find_peak(mesh: Mesh, dtype: torch.dtype) -> Peak:
    """The peak of all ranks' devices in ``dtype``. Every rank calls it: unknown devices are measured all at once."""
    name, known = "CPU", None
    if mesh.device.type == "cuda":
        name = torch.cuda.get_device_name(mesh.device)
        known = next((peaks.get(dtype) for part, peaks in GPU_PEAKS if part in name), None)
    everywhere = torch.tensor([known is not None], dtype=torch.int64, device=mesh.device)
    is_known = bool(collectives.all_reduce(everywhere, mesh.world, "min"))
    own = known if known is not None and is_known else _measure(mesh, dtype)
    total = collectives.all_reduce(torch.tensor([own], dtype=torch.float64, device=mesh.device), mesh.world)
    source = "data sheet" if is_known else "measured matmul"
    return Peak(name, str(dtype).removeprefix("torch."), source, float(total))


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
