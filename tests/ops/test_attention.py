from __future__ import annotations

import functools
import importlib
import types

import pytest
import torch
from torch import Tensor

from megatron_lite.ops import attention, attention_kernels, native
from megatron_lite.ops.attention import attention_reference
from megatron_lite.ops.attention_sdpa import visible
from tests.ops.attention_plain import documents_of, plain, qkv
from tests.ops.oracle import assert_same_bits, check_against_plain, run_with_gradients

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


# Backends that run here in every dtype of DTYPES; the C++ kernels have no fp64.
BACKENDS = ["auto", "sdpa", "reference"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "dim"), [(19, 1, 1, 40), (59, 4, 4, 40), (113, 4, 2, 64), (64, 8, 1, 59)]
)
def test_error_is_at_most_twice_that_of_plain_torch(
    tokens: int, heads: int, kv_heads: int, dim: int, packed: bool, dtype: torch.dtype
) -> None:
    documents = documents_of([tokens // 3, tokens - tokens // 3], 2) if packed else None
    arguments = qkv(2, tokens, heads, kv_heads, dim, dtype)
    for op in (attention, functools.partial(attention, backend="sdpa"), attention_reference):
        bound = [functools.partial(f, documents=documents) for f in (op, plain)]
        check_against_plain(*bound, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_lone_token_attends_to_itself(dtype: torch.dtype) -> None:
    q, k, v = qkv(2, 1, 4, 2, 40, dtype)
    assert torch.equal(attention(q, k, v), v.repeat_interleave(2, dim=2))


@pytest.mark.parametrize("packed", [False, True])
def test_all_may_see_all_without_causal(packed: bool) -> None:
    documents = documents_of([11, 20], 1) if packed else None
    arguments = qkv(1, 31, 2, 1, 16, torch.float32)
    op = functools.partial(attention, documents=documents, causal=False)
    check_against_plain(op, functools.partial(plain, documents=documents, causal=False), arguments)
    assert not torch.equal(op(*arguments), attention(*arguments, documents=documents))


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_is_float64_end_to_end(backend: str) -> None:
    """1e-13: a few hundred roundings of 1e-16. A single step in float32 would leave 1e-8."""
    arguments = qkv(2, 77, 4, 2, 40, torch.float64)
    actual = run_with_gradients(functools.partial(attention, backend=backend), arguments)
    exact = run_with_gradients(attention_reference, arguments)
    for a, e in zip(actual, exact, strict=True):
        assert a.dtype == torch.float64
        assert (a - e).abs().max() <= 1e-13 * e.abs().max()


def test_reference_against_a_loop_over_queries() -> None:
    """The specification itself, by the definition: softmax over the keys that a query sees, one query at a time."""
    q, k, v = qkv(1, 9, 4, 2, 8, torch.float64)
    documents = documents_of([4, 5], 1)
    expected = torch.empty_like(q)
    for i in range(9):
        keys = [j for j in range(i + 1) if documents[0, i] == documents[0, j]]
        for h in range(4):
            weights = torch.softmax(q[0, i, h] @ k[0, keys, h // 2].T / 8**0.5, dim=0)
            expected[0, i, h] = weights @ v[0, keys, h // 2]
    torch.testing.assert_close(attention_reference(q, k, v, documents), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_documents_never_see_each_other(dtype: torch.dtype, backend: str) -> None:
    """Changing document 0 changes no bit of document 1, forward or backward; without boundaries it does."""
    documents = documents_of([37, 40], 2)
    first = qkv(2, 77, 4, 2, 40, dtype)
    second = [torch.cat((-3 * t[:, :37], t[:, 37:]), dim=1) for t in first]
    packed = functools.partial(attention, documents=documents, backend=backend)
    results = [run_with_gradients(packed, arguments) for arguments in (first, second)]
    assert_same_bits([t[:, 37:].clone() for t in results[0]], [t[:, 37:].clone() for t in results[1]])
    assert not torch.equal(results[0][0][:, :37], results[1][0][:, :37])
    open_results = [attention(*arguments, backend=backend)[:, 37:] for arguments in (first, second)]
    assert not torch.equal(open_results[0], open_results[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_packed_document_is_computed_as_if_alone(dtype: torch.dtype) -> None:
    arguments = qkv(1, 77, 4, 2, 40, dtype)
    packed = attention(*arguments, documents=documents_of([37, 40], 1))
    alone = attention(*(t[:, 37:] for t in arguments))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13  # sums of 40 terms, split into blocks at other places
    torch.testing.assert_close(packed[:, 37:], alone, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_shared_heads_are_sums_over_their_group(backend: str) -> None:
    q, k, v = qkv(2, 33, 8, 2, 16, torch.float64)
    shared = run_with_gradients(functools.partial(attention, backend=backend), [q, k, v])
    own = run_with_gradients(
        functools.partial(attention, backend=backend),
        [q, k.repeat_interleave(4, dim=2), v.repeat_interleave(4, dim=2)],
    )
    torch.testing.assert_close(shared[:2], own[:2], rtol=1e-12, atol=1e-12)
    for a, b in zip(shared[2:], own[2:], strict=True):
        torch.testing.assert_close(a, b.unflatten(2, (2, 4)).sum(dim=3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_and_batch_rows_are_independent(dtype: torch.dtype) -> None:
    arguments = qkv(3, 65, 4, 2, 40, dtype)
    first, again = run_with_gradients(attention, arguments), run_with_gradients(attention, arguments)
    assert_same_bits(first, again)
    alone = attention(*(t[1:2].clone() for t in arguments))
    assert_same_bits([first[0][1:2].clone()], [alone])


def test_gradcheck_in_float64() -> None:
    arguments = [t.requires_grad_() for t in qkv(1, 5, 2, 1, 3, torch.float64)]
    assert torch.autograd.gradcheck(functools.partial(attention, documents=documents_of([2, 3], 1)), arguments)


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_without_a_graph_break(packed: bool) -> None:
    op = functools.partial(attention, documents=documents_of([11, 20], 1) if packed else None)
    arguments = qkv(1, 31, 2, 1, 16, torch.float32)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for a, b in zip(run_with_gradients(compiled, arguments), run_with_gradients(op, arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


WINDOWS = [2, 7, 30, 31, 500]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_is_at_most_twice_as_wrong_as_plain_torch(
    window: int, packed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, and in chunks of 8 queries, as long sequences are computed."""
    options = {"documents": documents_of([11, 20], 2) if packed else None, "window": window}
    arguments = qkv(2, 31, 4, 2, 16, dtype)
    for chunk in (1024, 8):
        monkeypatch.setattr(importlib.import_module("megatron_lite.ops.attention_sdpa"), "WINDOW_CHUNK", chunk)
        for op in (attention, functools.partial(attention, backend="sdpa"), attention_reference):
            check_against_plain(*[functools.partial(f, **options) for f in (op, plain)], arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_is_the_last_keys_and_the_token_itself(backend: str) -> None:
    """Each query alone, over exactly the keys that it may see; one key more or less is another result."""
    q, k, v = qkv(1, 23, 4, 2, 16, torch.float64)
    out = attention(q, k, v, window=5, backend=backend)
    for i in range(23):
        keys = slice(max(0, i - 4), i + 1)
        alone = attention(q[:, i : i + 1], k[:, keys], v[:, keys], backend="reference")
        torch.testing.assert_close(out[:, i : i + 1], alone, rtol=0, atol=1e-13)
    for other in (4, 6):
        assert (out - attention(q, k, v, window=other, backend=backend))[:, 6:].abs().amin(dim=(0, 2, 3)).min() > 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 1, 4, 40])
@pytest.mark.parametrize("num_queries", [1, 2, 9])
@pytest.mark.parametrize("packed", [False, True])
def test_the_last_queries_are_computed_as_among_all(
    num_queries: int, window: int | None, packed: bool, backend: str
) -> None:
    q, k, v = qkv(2, 31, 4, 2, 16, torch.float64)
    documents = documents_of([21, 10], 2) if packed else None
    whole = attention(q, k, v, documents, window=window, backend="reference")
    last = attention(q[:, -num_queries:], k, v, documents, window=window, backend=backend)
    torch.testing.assert_close(last, whole[:, -num_queries:], rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 1, 4, 40])
@pytest.mark.parametrize("num_queries", [1, 3])
def test_rows_of_different_lengths_are_computed_as_if_alone(num_queries: int, window: int | None, backend: str) -> None:
    """And what lies behind a row's end does not matter."""
    q, k, v = qkv(3, 31, 4, 2, 16, torch.float64)
    q, lengths = q[:, :num_queries], torch.tensor([31, 3, 17])
    together = attention(q, k, v, window=window, lengths=lengths, backend=backend)
    for row, length in enumerate(lengths.tolist()):
        own = (q[row : row + 1], k[row : row + 1, :length], v[row : row + 1, :length])
        alone = attention(*own, window=window, backend="reference")
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-13)
        k[row, length:], v[row, length:] = 1e6, -1e6
    assert torch.equal(attention(q, k, v, window=window, lengths=lengths, backend=backend), together)
    assert not torch.equal(attention(q, k, v, window=window, backend=backend), together)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_of_any_integers(backend: str) -> None:
    q, k, v = qkv(3, 31, 4, 2, 16, torch.float64)
    lengths = torch.tensor([31, 12, 17])
    expected = attention(q[:, :9], k, v, lengths=lengths, backend=backend)
    for dtype in (torch.uint8, torch.int8, torch.int32):
        assert torch.equal(attention(q[:, :9], k, v, lengths=lengths.to(dtype), backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8], ids=str)
def test_larger_lengths_count_as_all_keys_where_they_are_not_looked_at(
    dtype: torch.dtype, window: int | None, backend: str
) -> None:
    """As on a GPU. Of 300 keys, which 8 bits do not hold, none is lost to a wrapped length."""
    for keys, lengths, expected in ((31, [40, 12, 31], [31, 12, 31]), (300, [255, 12, 90], [255, 12, 90])):
        q, k, v = qkv(3, keys, 4, 2, 16, torch.float64)

        def run(lengths: Tensor, tensors: tuple[Tensor, ...] = (q[:, :9], k, v)) -> Tensor:
            return attention(*tensors, window=window, lengths=lengths, backend=backend)

        compiled = torch.compile(run, fullgraph=True, backend="eager")
        right = run(torch.tensor(expected))
        torch.testing.assert_close(compiled(torch.tensor(lengths, dtype=dtype)), right, rtol=0, atol=1e-13)


@pytest.mark.skipif(
    native.missing_cpu() is not None or not hasattr(torch.ops.megatron_lite_cuda, "attention"),
    reason="built without CUDA kernels",
)
def test_the_cuda_kernels_are_told_what_shared_memory_the_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {}
    device = types.SimpleNamespace(shared_memory_per_block_optin=101376)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device_of_q: device)
    monkeypatch.setattr(native, "run_cuda", lambda name, *arguments: calls.update({name: arguments}))
    q, k, v = qkv(1, 5, 2, 1, 16, torch.float32)
    mask = (None, None, 0.25, True, 0, True)
    attention_kernels._forward_cuda(q, k, v, *mask)
    attention_kernels._backward_cuda(q, q, k, v, q, q[..., 0], None, *mask)
    for name, arguments in calls.items():
        names = [a.name for a in getattr(torch.ops.megatron_lite_cuda, name).default._schema.arguments]
        given = dict(zip(names, arguments, strict=False))
        assert len(names) == len(arguments) + 1 and given["shared_bytes"] == 101376 and given["window"] == 0
    assert set(calls) == {"attention", "attention_backward"}


def test_the_rule_catches_a_mask_that_lets_one_future_key_through() -> None:
    """Negative control."""
    arguments = qkv(1, 31, 2, 1, 16, torch.float32)

    def leaky(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = visible(None, True, 31, 31, q.device)
        assert mask is not None
        mask[7, 8] = True
        heads = [t.transpose(1, 2) for t in (q, k, v)]
        return torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    with pytest.raises(AssertionError, match="output 0"):
        check_against_plain(leaky, plain, arguments)
