"""The C++ kernels of attention on the CPU: every instruction set, odd shapes, the registrations, memory."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_lite.ops import attention, native
from megatron_lite.ops.attention_kernels import document_bounds
from megatron_lite.ops.attention_sdpa import visible
from tests.ops.attention_plain import documents_of, plain, qkv
from tests.ops.oracle import (
    assert_same_bits,
    check_against_plain,
    run_python,
    run_with_gradients,
    same_bits_for_any_threads,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SETS = {0: "portable", 1: "avx2", 2: "avx512", 3: "avx512bf16"}
# (queries, keys): more keys than queries come from a cache. 193 and 97 are one past a block of the kernel.
LENGTHS = [(1, 1), (113, 203), (97, 193), (193, 193)]

pytestmark = pytest.mark.skipif(native.missing_cpu() is not None, reason=str(native.missing_cpu()))
kernel = functools.partial(attention, backend="cpu")


def with_set(isa: int, bounds: Tensor | None, causal: bool, window: int) -> Callable[..., Tensor]:
    """The kernels of one instruction set. One that this CPU lacks runs as the best below it, so no test is empty."""

    class Raw(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):  # type: ignore[no-untyped-def]
            ctx.mask = (bounds, None, q.shape[-1] ** -0.5, causal, window, isa)
            out, _, stats = torch.ops.megatron_lite_cpu.attention(q, k, v, *ctx.mask)
            ctx.save_for_backward(q, k, v, out, stats)
            return out

        @staticmethod
        def backward(ctx, d_out):  # type: ignore[no-untyped-def]
            return torch.ops.megatron_lite_cpu.attention_backward(d_out, *ctx.saved_tensors, None, *ctx.mask)

    return Raw.apply


@pytest.mark.parametrize("isa", SETS, ids=SETS.values())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [8, 40, 59, 80, 111, 128, 256])
def test_every_instruction_set_and_head_dimension(dim: int, dtype: torch.dtype, isa: int) -> None:
    check_against_plain(with_set(isa, None, True, 0), plain, qkv(1, 33, 2, 1, dim, dtype, keys=70))
    documents = documents_of([11, 60, 32], 2)
    packed = functools.partial(plain, documents=documents, window=37)
    check_against_plain(with_set(isa, document_bounds(documents), True, 37), packed, qkv(2, 103, 2, 2, dim, dtype))


@pytest.mark.parametrize("isa", SETS, ids=SETS.values())
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_errors_are_on_average_no_larger_than_those_of_plain_torch(dim: int, isa: int) -> None:
    """Root mean squares over draws. The largest of a few errors is luck: it hides a loss here, and shows none there.

    A fifth more: in gradients delta is a sum of its own, so that less of its rounding cancels than in plain torch.
    """
    ops = (with_set(isa, None, True, 5), functools.partial(plain, window=5))
    squares = torch.zeros(2, 4, dtype=torch.float64)
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        arguments = [torch.randn(1, 60, 2, dim, generator=generator) for _ in range(3)]
        exact = run_with_gradients(ops[1], [t.double() for t in arguments], rounding=torch.float32)
        for own, op in zip(squares, ops, strict=True):
            results = zip(run_with_gradients(op, arguments), exact, strict=True)
            own += torch.stack([(a.double() - e).square().sum() for a, e in results])
    ratios = (squares[0] / squares[1]).sqrt()
    assert (ratios <= 1.2).all(), ratios


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
def test_lengths_that_no_block_divides(queries: int, keys: int, causal: bool, dtype: torch.dtype) -> None:
    arguments = qkv(1, queries, 4, 2, 40, dtype, keys=keys)
    op, expected = (functools.partial(f, causal=causal) for f in (kernel, plain))
    check_against_plain(op, expected, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_thousand_positions(dtype: torch.dtype) -> None:
    check_against_plain(kernel, plain, qkv(1, 1023, 1, 1, 64, dtype, keys=1024))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs_as_a_fused_projection_gives_them(dtype: torch.dtype) -> None:
    fused = torch.cat(qkv(2, 50, 4, 2, 24, dtype), dim=2)
    strided = fused.split((4, 2, 2), dim=2)
    assert not any(t.is_contiguous() for t in strided)
    assert_same_bits([kernel(*strided)], [kernel(*(t.contiguous() for t in strided))])
    turned = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in strided]  # the last dimension has a stride, too
    assert_same_bits([kernel(*turned)], [kernel(*strided)])
    expanded = [fused[:1, :, :4].expand(3, -1, -1, -1), *(fused[:1, :, i : i + 1].expand(3, -1, 2, -1) for i in (4, 6))]
    check_against_plain(kernel, plain, expanded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_values(dtype: torch.dtype) -> None:
    """Scores of 1e8 and more, as fp32's logarithm of a sum cannot tell apart: each query picks one key."""
    arguments = [t * 1e4 for t in qkv(1, 130, 2, 1, 40, dtype)]
    results, expected = run_with_gradients(kernel, arguments), run_with_gradients(plain, arguments)
    assert all(torch.isfinite(t).all() for t in results)
    if dtype == torch.bfloat16:
        check_against_plain(kernel, plain, arguments)
    else:  # the exact gradients of q and k are zero; weights end at 2^-126 and leave less than the smallest of numbers
        for a, b in zip(results, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-20)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_zeros_are_means(dtype: torch.dtype) -> None:
    q, k, v = qkv(1, 40, 2, 1, 40, dtype)
    check_against_plain(kernel, plain, (torch.zeros_like(q), k, v))
    check_against_plain(kernel, plain, (q, torch.zeros_like(k), torch.zeros_like(v)))


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0)])
def test_empty_tensors(shape: tuple[int, int, int]) -> None:
    batch, queries, keys = shape
    q = torch.randn(batch, queries, 4, 16, requires_grad=True)
    k, v = (torch.randn(batch, keys, 2, 16, requires_grad=True) for _ in range(2))
    out = attention(q, k, v)
    out.sum().backward()
    for t in (q, k, v):
        assert t.grad is not None and torch.equal(t.grad, torch.zeros_like(t))
    assert torch.equal(out, torch.zeros_like(q))
    raw = torch.ops.megatron_lite_cpu.attention(q, k, v, None, None, 0.25, True, 0)
    assert torch.equal(raw[0], torch.zeros_like(q))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (16, 8)], ids=str)  # 1 key head: a group is more than one item
def test_bits_depend_on_neither_threads_nor_batch_nor_the_queries_before(
    heads: tuple[int, int], dtype: torch.dtype
) -> None:
    arguments = qkv(2, 211, *heads, 24, dtype)
    out = same_bits_for_any_threads(kernel, arguments)[0]
    q, k, v = arguments
    for last in (1, 7, 100):
        assert_same_bits([kernel(q[1:, -last:], k[1:], v[1:])], [out[1:, -last:].clone()])


def test_gradients_of_keys_have_the_bits_of_any_batch() -> None:
    """8 rows of one key head are 8 items, one row is one item for each query head: the same sums in the same order."""
    arguments = qkv(8, 40, 4, 1, 24, torch.float32)
    d_out = torch.randn(8, 40, 4, 24)

    def gradients(rows: slice) -> list[Tensor]:
        leaves = [t[rows].clone().requires_grad_() for t in arguments]
        return list(torch.autograd.grad(kernel(*leaves), leaves, d_out[rows]))

    whole, part = gradients(slice(0, 8)), gradients(slice(3, 4))
    assert_same_bits([t[3:4].clone() for t in whole], part)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_operator_registrations(packed: bool, dtype: torch.dtype) -> None:
    q, k, v = (t.requires_grad_() for t in qkv(1, 20, 2, 1, 16, dtype))
    bounds = document_bounds(documents_of([9, 11], 1)) if packed else None
    slopes = torch.tensor([0.5, 0.25]) if packed else None
    options = (bounds, slopes, 0.25, True, 0, True)
    torch.library.opcheck(torch.ops.megatron_lite.attention_cpu.default, (q, k, v, *options))
    out, lse, stats = torch.ops.megatron_lite.attention_cpu(q, k, v, *options)
    saved = [t.detach() for t in (out, q, k, v, out, stats, lse)]
    torch.library.opcheck(torch.ops.megatron_lite.attention_cpu_backward.default, (*saved, *options))
    torch.library.opcheck(torch.ops.megatron_lite.document_bounds.default, (documents_of([9, 11], 1),))


def test_a_second_derivative_is_refused() -> None:
    q, k, v = (t.requires_grad_() for t in qkv(1, 20, 2, 1, 16, torch.float32))
    (dq,) = torch.autograd.grad(kernel(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no gradient"):
        dq.sum().backward()


_MEASURE = """
import ctypes, json, torch
from megatron_lite.ops import attention

def peak(tokens, backend):
    leaves = [torch.randn(1, tokens, heads, 32).bfloat16().requires_grad_() for heads in (2, 1, 1)]
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not there to be used again
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    attention(*leaves, backend=backend).sum().backward()
    return status("VmHWM") - before

def status(key):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(key))

torch.set_num_threads(1)
peak(512, "cpu"), peak(512, "reference")  # what the first call alone takes
print(json.dumps([peak(*case) for case in ((4096, "cpu"), (8192, "cpu"), (16384, "cpu"), (4096, "reference"))]))
"""


def test_memory_grows_with_the_length_and_not_with_its_square() -> None:
    """MiB that one forward and backward adds. Scores of 16k x 16k in bf16 would be 512 MiB a head."""
    small, middle, large, reference = json.loads(run_python("-c", _MEASURE))
    assert large <= 2.2 * middle + 2 and middle <= 2.2 * small + 2 and large < 64
    assert reference > 64  # negative control: a quarter of the length, and what holds all scores shows


def test_the_rule_catches_a_mask_that_is_off_by_one() -> None:
    """Negative control, and the kernel's own masks at their edges."""
    arguments = qkv(1, 101, 2, 1, 16, torch.float32)
    for window, wrong in ((17, 16), (17, 18)):
        with pytest.raises(AssertionError, match="output 0"):
            check_against_plain(
                functools.partial(kernel, window=wrong), functools.partial(plain, window=window), arguments
            )
    shifted = documents_of([40, 61], 1).roll(1)
    shifted[0, 0] = 0
    with pytest.raises(AssertionError, match="output 0"):
        check_against_plain(
            functools.partial(kernel, documents=shifted),
            functools.partial(plain, documents=documents_of([40, 61], 1)),
            arguments,
        )


def test_the_range_of_a_document_is_its_mask() -> None:
    for lengths in ([31], [1, 30], [10, 1, 1, 19]):
        documents = documents_of(lengths, 2) % 3 if len(lengths) < 4 else documents_of(lengths, 2)
        bounds = document_bounds(documents)
        assert bounds is not None
        keys = torch.arange(31)
        seen = (keys >= bounds[..., :1]) & (keys < bounds[..., 1:])
        mask = visible(documents, False, 31, 31, documents.device)
        assert mask is not None and torch.equal(seen, mask[:, 0])
    assert document_bounds(torch.tensor([[0, 1, 0]])) is None
    assert document_bounds(torch.tensor([[3, 3, -1], [5, 2, 7]])) is not None
