"""What GPUs can compute, from their data sheets. Read by cluster files, and by training for its utilisation."""

from __future__ import annotations

from collections.abc import Mapping

# Dense peaks, TFLOP/s, from NVIDIA's data sheets: bf16 on tensor cores (fp16 has the same), fp32 and fp64 without TF32.
# The first name that is part of the device's name counts, so the longer names come first.
GPU_PEAKS_TFLOPS: tuple[tuple[str, Mapping[str, float]], ...] = (
    ("B200", {"bf16": 2250, "fp32": 75, "fp64": 37}),
    ("GH200", {"bf16": 989.4, "fp32": 67, "fp64": 67}),
    ("H200", {"bf16": 989.4, "fp32": 67, "fp64": 67}),
    ("H100 PCIe", {"bf16": 756, "fp32": 51, "fp64": 51}),
    ("H100 NVL", {"bf16": 835, "fp32": 60, "fp64": 60}),
    ("H100", {"bf16": 989.4, "fp32": 67, "fp64": 67}),
    ("A100", {"bf16": 312, "fp32": 19.5, "fp64": 19.5}),
    ("L40S", {"bf16": 362, "fp32": 91.6}),
    ("RTX 4090", {"bf16": 165.2, "fp32": 82.6}),
    ("RTX 3090", {"bf16": 71, "fp32": 35.6}),
)


def gpu_peaks_tflops(device_name: str) -> dict[str, float]:
    """Dense TFLOP/s of a GPU by the name that CUDA gives it: fp32, bf16, fp16 and fp64 as far as the data sheet says.

    Empty for a GPU that is not in the table.
    """
    peaks = next((dict(peaks) for part, peaks in GPU_PEAKS_TFLOPS if part in device_name), {})
    return peaks | ({"fp16": peaks["bf16"]} if "bf16" in peaks else {})
