"""Attention's Triton kernels against `_definition`, the scores and the softmax written out in plain torch.

The blocks are those of sm_80, in fp32 small enough that a hundred tokens have skipped, masked and whole ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_lite._csrc.attention import triton as kernels
from tests.ops.oracle import assert_same_bits, assert_within
from tests.ops.triton_cases.case import POINTERS, Case, number_dtypes

_FP32_POINTERS = ("lse_ptr", "d_lse_ptr", "base_ptr", "delta_ptr", "slopes_ptr")
_INTEGER_POINTERS = ("bounds_ptr", "first_ptr", "stop_ptr", "ranges_ptr")
_SIZES = ("num_queries", "num_keys", "heads", "group", "dim", "behind", "ahead")
_KERNELS = {
    "forward": kernels.attention_forward,
    "backward_keys": kernels.attention_backward_keys,
    "backward_queries": kernels.attention_backward_queries,
}
_DIMS = {"bf16": (64, 128, 256), "fp16": (111,), "fp32": (64, 128, 256)}


@dataclass(frozen=True)
class Shape:
    """One call. `documents` are the lengths of documents packed into the keys; the last `unseeing` queries see none."""

    num_queries: int = 100
    num_keys: int = 100
    batch: int = 1
    heads: int = 2
    key_heads: int = 1
    dim: int = 16
    causal: bool = True
    window: int = 0
    documents: tuple[int, ...] = ()
    unseeing: int = 0
    slope: float = 0.0
    has_d_lse: bool = False
    is_strided: bool = False


WINDOW = Shape(window=20, slope=0.3)
DOCUMENTS = Shape(batch=2, documents=(20, 50, 30), unseeing=3, has_d_lse=True)
SHAPES = (
    Shape(),
    Shape(1, 9, batch=2, dim=40),
    Shape(67, 96, batch=2, heads=4, key_heads=2, causal=False, has_d_lse=True),
    Shape(50, 90, dim=59, has_d_lse=True, is_strided=True),
    Shape(96, 60, heads=1, dim=80, has_d_lse=True),  # the first 36 queries see nothing
    WINDOW,
    Shape(64, 96, window=50, heads=3, causal=False, slope=0.2),
    DOCUMENTS,
    Shape(128, 128, documents=(97, 31), causal=False, dim=32, key_heads=2),
    Shape(40, 70, documents=(25, 25, 20), window=18, slope=0.1, dim=111, is_strided=True),
)
WRONG = (  # what is asked for, and what is compared with it
    (WINDOW, replace(WINDOW, window=21)),
    (WINDOW, replace(WINDOW, slope=0.33)),
    (DOCUMENTS, replace(DOCUMENTS, documents=(20, 51, 29))),
    (DOCUMENTS, replace(DOCUMENTS, has_d_lse=False)),
)
RESULTS = ("out", "lse", "dq", "dk", "dv")
# By how much a result is made wrong. Plain torch in bf16, beside which it is held, is some per cent off itself.
SLIPS = {torch.float32: 0.03, torch.float16: 0.03, torch.bfloat16: 0.25}
NUM_CONTROLS = len(number_dtypes()) * len(SHAPES) * len(RESULTS) + len(WRONG)


def compile_cases() -> Iterator[Case]:
    """The kernels with bounds and slopes, which take the most registers, as they are launched on sm_80 and sm_90."""
    for sm in (80, 90):
        for dtype, dims in _DIMS.items():
            for dim in dims:
                yield from _cases(sm, dtype, dim)


def _cases(sm: int, dtype: str, dim: int) -> Iterator[Case]:
    names = {name for kernel in (*_KERNELS.values(), kernels.attention_backward_rows) for name in kernel.arg_names}
    types = {name: POINTERS[dtype] for name in names if name.endswith("_ptr")}
    types |= dict.fromkeys(_FP32_POINTERS, "*fp32") | dict.fromkeys(_INTEGER_POINTERS, "*i32")
    types |= {name: "i32:16" for name in names if name.endswith(("_batch", "_row", "_head"))}
    types |= dict.fromkeys(_SIZES, "i32") | {"scale": "fp32"}
    block_dim = kernels.padded(dim)
    flags = {"BLOCK_DIM": block_dim, "EVEN_DIM": dim == block_dim, "HAS_BOUNDS": True, "HAS_SLOPES": True}
    itemsize = 4 if dtype == "fp32" else 2
    for name, kernel in _KERNELS.items():
        tiles = kernels.tiles(name, dim, itemsize, sm)
        blocks = {"BLOCK_QUERIES": tiles.queries, "BLOCK_KEYS": tiles.keys}
        constants = {key: value for key, value in (flags | blocks).items() if key in kernel.arg_names}
        yield Case(f"{name} {dtype} {dim}", kernel, types, constants, tiles.warps, tiles.stages, sm)
    if dim not in (111, 256):
        return
    queries = kernels.tiles("backward_keys", dim, itemsize, sm).queries
    constants = {**flags, "BLOCK_QUERIES": queries, "HAS_D_LSE": True}
    del constants["HAS_SLOPES"]
    yield Case(f"backward_rows {dtype} {dim}", kernels.attention_backward_rows, types, constants, sm=sm)


def check_numbers() -> int:
    caught = sum(_check(shape, dtype) for dtype in number_dtypes() for shape in SHAPES)
    assert_same_bits(*(_kernel_results(DOCUMENTS, torch.float32) for _ in range(2)))
    for asked, done in WRONG:
        wrong, plain, exact = _kernel_results(done, torch.float32), *_expected(asked, torch.float32)
        caught += any(not _is_within(*results, factor=3.0) for results in zip(wrong, plain, exact, strict=True))
    return caught


def _check(shape: Shape, dtype: torch.dtype) -> int:
    """Checks the five results; returns how many of them, once made wrong by a slip, were caught."""
    results = _kernel_results(shape, dtype)
    plain, exact = _expected(shape, dtype)
    caught = 0
    for name, actual, p, e in zip(RESULTS, results, plain, exact, strict=True):
        factor = 2.0 if name in ("out", "lse") else 3.0
        sees = e > -math.inf
        assert torch.equal(sees, actual > -math.inf), f"{name}: {shape}"
        assert_within(f"{name} {dtype} {shape}", actual[sees], p[sees], e[sees], factor)
        caught += not _is_within(actual * (1 + SLIPS[dtype]), p, e, factor)
    return caught


def _is_within(actual: Tensor, plain: Tensor, exact: Tensor, factor: float) -> bool:
    sees = exact > -math.inf
    try:
        assert_within("control", actual[sees], plain[sees], exact[sees], factor)
    except AssertionError:
        return False
    return True


def _inputs(shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, d_out, d_lse: the same numbers for every shape of these sizes."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(shape.dim)
    sizes = [
        (shape.num_queries, shape.heads),
        *[(shape.num_keys, shape.key_heads)] * 2,
        (shape.num_queries, shape.heads),
    ]
    tensors = []
    for tokens, heads in sizes:
        wide = torch.randn(shape.batch, tokens, heads, shape.dim + 3, generator=generator).to(dtype)
        tensors.append(wide[..., : shape.dim] if shape.is_strided else wide[..., : shape.dim].contiguous())
    return [*tensors, torch.randn(shape.batch, shape.heads, shape.num_queries, generator=generator)]


def _masks(shape: Shape) -> tuple[Tensor | None, Tensor | None]:
    """bounds and slopes."""
    slopes = shape.slope * torch.arange(1, shape.heads + 1) if shape.slope else None
    if not shape.documents:
        return None, slopes
    lengths = torch.tensor(shape.documents)
    stops = lengths.cumsum(0)
    bounds = torch.stack([stops - lengths, stops], dim=1).repeat_interleave(lengths, dim=0)[-shape.num_queries :]
    bounds = bounds.to(torch.int32).expand(shape.batch, -1, -1).clone()
    bounds[:, shape.num_queries - shape.unseeing :, 1] = bounds[:, shape.num_queries - shape.unseeing :, 0]
    return bounds, slopes


def _kernel_results(shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    q, k, v, d_out, d_lse = _inputs(shape, dtype)
    bounds, slopes = _masks(shape)
    options = (bounds, slopes, shape.dim**-0.5, shape.causal, shape.window)
    out, lse = kernels.forward(q, k, v, *options)
    return [out, lse, *kernels.backward(d_out, q, k, v, out, lse, d_lse if shape.has_d_lse else None, *options, True)]


def _expected(shape: Shape, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """What plain torch finds in `dtype` and in float64."""
    q, k, v, d_out, d_lse = _inputs(shape, dtype)

    def results(convert: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [convert(x).detach().requires_grad_() for x in (q, k, v)]
        out, lse = _definition(shape, *leaves)
        loss = (out * convert(d_out)).sum()
        if shape.has_d_lse:
            loss = loss + (lse.masked_fill(lse == -math.inf, 0.0) * convert(d_lse)).sum()
        gradients = torch.autograd.grad(loss, leaves)
        return [out.detach(), lse.detach().to(torch.promote_types(lse.dtype, torch.float32)), *gradients]

    return results(lambda x: x.to(dtype, copy=True)), results(Tensor.double)


def _definition(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse), every intermediate in the dtype of q."""
    group = shape.heads // shape.key_heads
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    bounds, slopes = _masks(shape)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * shape.dim**-0.5
    position = torch.arange(shape.num_keys - shape.num_queries, shape.num_keys)[:, None]
    key = torch.arange(shape.num_keys)[None, :]
    visible = torch.ones(shape.batch, 1, shape.num_queries, shape.num_keys, dtype=torch.bool)
    if shape.causal:
        visible &= key <= position
    if shape.window:
        visible &= key > position - shape.window
    if bounds is not None:
        visible &= (key >= bounds[:, None, :, :1]) & (key < bounds[:, None, :, 1:])
    if slopes is not None:
        scores = scores - slopes[:, None, None].to(q.dtype) * (position - key).abs()
    scores = scores.masked_fill(~visible, -math.inf)
    lse = scores.logsumexp(dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    return torch.einsum("bhij,bjhd->bihd", weights, v), lse
