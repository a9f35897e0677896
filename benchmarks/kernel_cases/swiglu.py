from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_cases.case import KernelCase, compiled, forward_backward
from megatron_lite.ops.swiglu import swiglu, swiglu_reference

# Rows, and the width of the feed-forward block.
SHAPES = {"cpu": ((2048, 11008), (4096, 5504)), "cuda": ((2048, 11008), (16384, 11008), (16384, 14336))}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def eager(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def cases(device: str = "cpu") -> list[KernelCase]:
    return [_case(rows, ffn, dtype, device) for rows, ffn in SHAPES[device] for dtype in DTYPES]


def _case(rows: int, ffn: int, name: str, device: str) -> KernelCase:
    gate_up = torch.randn(rows, 2 * ffn, device=device, dtype=DTYPES[name], requires_grad=True)
    own = ("cuda", "triton") if device == "cuda" else ()
    contenders = {
        "ours": swiglu,
        **{f"ours, {backend}": functools.partial(swiglu, backend=backend) for backend in own},
        "F.silu(gate) * up": eager,
        "torch.compile": compiled(swiglu_reference),
    }
    return KernelCase(
        op="swiglu",
        label=f"{rows} x 2 * {ffn}",
        dtype=name,
        contenders={name: forward_backward(op, gate_up) for name, op in contenders.items()},
        # Of F numbers a row: forward reads 2 and writes 1; backward reads 3 and writes 2.
        bytes_moved=8 * rows * ffn * gate_up.element_size(),
    )
