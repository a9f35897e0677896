from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernel_cases.case import KernelCase, compiled, forward_backward
from megatron_lite.ops.rotary import rotary, rotary_projections, rotary_reference

HEADS, KV_HEADS, DIM = 32, 8, 128
TOKENS = {"cpu": (2048,), "cuda": (2048, 16384)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The form that model code in plain PyTorch has, with tables of D columns in x's dtype."""
    cos, sin = (torch.cat((table, table), dim=-1).unsqueeze(2).to(q.dtype) for table in (cos, sin))
    return tuple(x * cos + torch.cat((-x[..., DIM // 2 :], x[..., : DIM // 2]), dim=-1) * sin for x in (q, k))


def cases(device: str = "cpu") -> list[KernelCase]:
    return [case(t, dtype, device) for t in TOKENS[device] for dtype in DTYPES for case in (_apart, _projections)]


def _angles(tokens: int, device: str) -> dict[str, Tensor]:
    theta = torch.rand(1, tokens, DIM // 2, device=device)
    return {"cos": theta.cos(), "sin": theta.sin()}


def _apart(tokens: int, name: str, device: str) -> KernelCase:
    """q and k as tensors of their own."""
    q, k = (
        torch.randn(1, tokens, heads, DIM, device=device, dtype=DTYPES[name], requires_grad=True)
        for heads in (HEADS, KV_HEADS)
    )
    own = ("cuda", "triton") if device == "cuda" else ()
    contenders: dict[str, Callable[..., tuple[Tensor, ...]]] = {
        "ours": rotary,
        **{f"ours, {backend}": functools.partial(rotary, backend=backend) for backend in own},
        "eager": eager,
        "torch.compile": compiled(rotary_reference),
    }
    angles = _angles(tokens, device)
    return KernelCase(
        op="rotary",
        label=f"q {tokens} x {HEADS} x {DIM}, k {tokens} x {KV_HEADS} x {DIM}",
        dtype=name,
        contenders={name: forward_backward(functools.partial(op, **angles), q, k) for name, op in contenders.items()},
        bytes_moved=4 * (q.numel() + k.numel()) * q.element_size(),  # each is read and written, there and back
    )


def _projections(tokens: int, name: str, device: str) -> KernelCase:
    """As the model has them: parts of one projection, whose gradient is one tensor. q and k are rotated in place."""
    widths = [heads * DIM for heads in (HEADS, KV_HEADS, KV_HEADS)]
    shapes = [(1, tokens, width // DIM, DIM) for width in widths]
    qkv = torch.randn(tokens, sum(widths), device=device, dtype=DTYPES[name], requires_grad=True)
    angles = _angles(tokens, device)

    def split(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.view(shape) for part, shape in zip(x.split(widths, dim=-1), shapes, strict=True))

    def of(op: Callable[..., tuple[Tensor, ...]]) -> Callable[[Tensor], tuple[Tensor, ...]]:
        return lambda x: (*op(*split(x)[:2], **angles), split(x)[2])

    contenders: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
        "ours": lambda x: rotary_projections(x, shapes, **angles, inplace=True),
        "eager": of(eager),
        "torch.compile": compiled(of(rotary_reference)),
    }
    rotated, whole = tokens * sum(widths[:2]), tokens * sum(widths)
    return KernelCase(
        op="rotary",
        label=f"of one projection, {tokens} x ({HEADS} + 2 * {KV_HEADS}) x {DIM}",
        dtype=name,
        contenders={name: forward_backward(op, qkv) for name, op in contenders.items()},
        bytes_moved=2 * (rotated + whole) * qkv.element_size(),  # v only moves in the backward, to its place
    )
