"""Causal attention, forward and backward, at the shapes of Llama models, against PyTorch's own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernel_cases.case import KernelCase
from megatron_lite.ops import attention
from megatron_lite.ops.attention import attention_reference
from megatron_lite.ops.checks import short

# (tokens, query heads, key heads, head dimension)
SHAPES = [(512, 32, 8, 128), (2048, 32, 8, 128), (4096, 32, 8, 128), (2048, 32, 8, 64)]
LONG_SHAPES = [(16384, 16, 16, 128), (16384, 32, 32, 64)]  # on a GPU: hidden 2048, as FlashAttention's papers have it
# What the reference holds of all scores has to fit; its compiled form holds them too.
MAX_REFERENCE_TOKENS = 512
SDPA_BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


def cases(device: str = "cpu") -> list[KernelCase]:
    return list(_cases(device))


def _cases(device: str) -> Iterator[KernelCase]:
    dtypes = [torch.bfloat16, torch.float32] if device == "cpu" else [torch.bfloat16, torch.float16]
    for dtype in dtypes:
        for tokens, heads, kv_heads, dim in SHAPES if device == "cpu" else SHAPES + LONG_SHAPES:
            yield _case(tokens, heads, kv_heads, dim, dtype, device)


def _case(tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: str) -> KernelCase:
    q, k, v, d_out = (
        torch.randn(1, tokens, n, dim, device=device).to(dtype) for n in (heads, kv_heads, kv_heads, heads)
    )
    leaves = [t.requires_grad_() for t in (q, k, v)]

    def both(op: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(op(*leaves), leaves, d_out)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        turned = [t.transpose(1, 2) for t in (q, k, v)]
        return F.scaled_dot_product_attention(*turned, is_causal=True, enable_gqa=heads != kv_heads).transpose(1, 2)

    own = ["cpu"] if device == "cpu" else ["cuda", "triton"]
    backends = {"ours": "auto", **{f"ours, {name}": name for name in own}}
    contenders = {name: both(functools.partial(attention, backend=backend)) for name, backend in backends.items()}
    contenders["sdpa"] = both(sdpa)
    for name, kind in SDPA_BACKENDS.items() if device == "cuda" else ():
        contenders[f"sdpa, {name}"] = both(sdpa_kernel(kind)(sdpa))
    if tokens <= MAX_REFERENCE_TOKENS:
        contenders["compiled reference"] = both(torch.compile(attention_reference))
    scores = tokens * (tokens + 1) // 2 * heads
    size = torch.finfo(dtype).bits // 8
    return KernelCase(
        op="attention",
        label=f"{tokens} tokens, {heads}/{kv_heads} heads of {dim}",
        dtype=short(dtype),
        contenders=contenders,
        # forward: reads q, k, v, writes out; backward: reads those and d_out, writes the gradients of q, k, v
        bytes_moved=(2 * q.numel() + 2 * k.numel() + 4 * q.numel() + 4 * k.numel()) * size,
        flops=scores * dim * 2 * 7,  # 2 products forward and 5 backward
    )
