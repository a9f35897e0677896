from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from benchmarks.kernel_cases.case import KernelCase, compiled, forward_backward
from megatron_lite.ops.gelu import gelu, gelu_reference

SHAPES = {"cpu": ((2048, 16384),), "cuda": ((2048, 16384), (16384, 16384))}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def cases(device: str = "cpu") -> list[KernelCase]:
    return [_case(rows, ffn, dtype, device) for rows, ffn in SHAPES[device] for dtype in DTYPES]


def _case(rows: int, ffn: int, name: str, device: str) -> KernelCase:
    x = torch.randn(rows, ffn, device=device, dtype=DTYPES[name], requires_grad=True)
    own = ("cuda", "triton") if device == "cuda" else ()
    contenders = {
        "ours": gelu,
        **{f"ours, {backend}": functools.partial(gelu, backend=backend) for backend in own},
        "F.gelu": functools.partial(F.gelu, approximate="tanh"),
        "torch.compile": compiled(gelu_reference),
    }
    return KernelCase(
        op="gelu",
        label=f"{rows} x {ffn}",
        dtype=name,
        contenders={name: forward_backward(op, x) for name, op in contenders.items()},
        # Forward reads x and writes y; backward reads x and dy and writes dx.
        bytes_moved=5 * x.numel() * x.element_size(),
    )
