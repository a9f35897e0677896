"""A step of AdamW on fp32 master weights, with clipped fp32 gradients; and the norm that they are clipped by."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.kernel_cases.case import KernelCase, compiled
from megatron_lite.ops.adamw import AdamWStep, adamw, adamw_reference
from megatron_lite.ops.block_squares import block_squares
from megatron_lite.ops.exact_sum import exact_sum

NUMEL = 64 << 20
STEP = AdamWStep(lr=1e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=10, factor=0.5)


def cases(device: str = "cpu") -> list[KernelCase]:
    label = f"{NUMEL >> 20} M"
    gradients = torch.randn(NUMEL, device=device)
    weights, first, second = torch.randn_like(gradients), torch.zeros_like(gradients), torch.zeros_like(gradients)
    parameters = torch.zeros_like(gradients, dtype=torch.bfloat16)
    memory = (weights, first, second, gradients)
    # Weights, moments and gradients are read, weights and moments written, and the parameters. That a CPU reads a line
    # before it writes to it is traffic that the op does not need, and is not counted.
    moved = (4 * 4 + 3 * 4) * NUMEL
    return [
        KernelCase("adamw", label, "fp32", _updates(memory, None, device), moved),
        KernelCase(
            "adamw", f"{label}, bf16 parameters", "bf16", _updates(memory, parameters, device), moved + 2 * NUMEL
        ),
        KernelCase("adamw", f"{label}, norm of the gradients", "fp32", _norms(gradients), 4 * NUMEL),
    ]


def _updates(memory: tuple[Tensor, ...], parameters: Tensor | None, device: str) -> Mapping[str, Callable[[], object]]:
    own = ("cuda", "triton") if device == "cuda" else ()
    backends = {"ours": "auto", **{f"ours, {name}": name for name in own}, "torch, fused": "torch", "apex": "apex"}
    contenders: dict[str, Callable[[], object]] = {
        name: functools.partial(adamw, *memory, STEP, parameters=parameters, backend=backend)
        for name, backend in backends.items()
    }
    return {**contenders, "torch.compile": functools.partial(compiled(adamw_reference), *memory, STEP, (), parameters)}


def _norms(gradients: Tensor) -> Mapping[str, Callable[[], object]]:
    return {
        "ours": lambda: exact_sum(block_squares(gradients)),
        "torch": lambda: torch.linalg.vector_norm(gradients),
        "torch, in fp64": lambda: torch.linalg.vector_norm(gradients, dtype=torch.float64),
    }
