"""ALiBi slopes, the log-sum-exp and its gradient, queries that see nothing, and what attention refuses."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite.ops import attention
from megatron_lite.ops.attention import attention_lse_reference
from tests.ops.attention_plain import documents_of, plain, plain_lse, qkv
from tests.ops.oracle import assert_same_bits, check_against_plain, run_with_gradients

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SLOPES = torch.tensor([2.0**-1, 2.0**-3, 2.0**-5, 2.0**-7])
MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 9},
    "documents": {"documents": documents_of([40, 73], 2)},
    "slopes": {"slopes": SLOPES},
    "slopes, full": {"slopes": SLOPES, "causal": False},
    "slopes, documents, window": {"slopes": SLOPES, "documents": documents_of([40, 73], 2), "window": 9},
}
with_lse = functools.partial(attention, return_lse=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_the_logsumexp_and_gradients_through_it(mask: dict[str, Any], dtype: torch.dtype) -> None:
    arguments = qkv(2, 113, 4, 2, 40, dtype)
    check_against_plain(functools.partial(with_lse, **mask), functools.partial(plain_lse, **mask), arguments)


def test_a_loss_of_the_logsumexp_alone() -> None:
    q, k, v = (t.requires_grad_() for t in qkv(1, 50, 4, 2, 24, torch.float32))
    ours = torch.autograd.grad(with_lse(q, k, v)[1].square().sum(), (q, k, v))
    exact = torch.autograd.grad(attention_lse_reference(q.double(), k.double(), v)[1].square().sum(), (q, k))
    for a, b in zip(ours[:2], exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours[2], torch.zeros_like(v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_blocks_of_keys_are_merged_by_their_logsumexp(dtype: torch.dtype) -> None:
    """As context parallelism does; the gradients of both parts come through out and lse."""
    arguments = qkv(1, 60, 4, 2, 24, dtype)

    def in_two_parts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [with_lse(q, k[:, keys], v[:, keys], causal=False) for keys in (slice(0, 25), slice(25, 60))]
        shares = torch.stack([lse for _, lse in parts]).softmax(dim=0).transpose(2, 3)[..., None]
        return sum((out * share for (out, _), share in zip(parts, shares, strict=True)), torch.zeros_like(q))

    whole = run_with_gradients(functools.partial(attention, causal=False), arguments)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    for a, b in zip(run_with_gradients(in_two_parts, arguments), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_that_see_nothing_are_zeros(dtype: torch.dtype) -> None:
    """The first 40 of 100 queries stand before the first of 60 keys."""
    q, k, v = (t.requires_grad_() for t in qkv(2, 100, 4, 2, 24, dtype, keys=60))
    out, lse = with_lse(q, k, v)
    assert torch.equal(out[:, :40], torch.zeros_like(out[:, :40])) and bool((lse[:, :, :40] == -torch.inf).all())
    seeing = [q[:, 40:], k, v]
    alone = with_lse(*seeing)
    torch.testing.assert_close(out[:, 40:], alone[0])
    torch.testing.assert_close(lse[:, :, 40:], alone[1])
    # From lse, too, whose gradient at -inf is nothing.
    grads = torch.autograd.grad(out.square().sum() + lse.exp().sum(), (q, k, v))
    expected = torch.autograd.grad(alone[0].square().sum() + alone[1].exp().sum(), (q, k, v))
    for a, b in zip(grads, expected, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b)
    if dtype in (torch.float32, torch.float64):  # which torch computes as exactly
        torch.testing.assert_close(attention(q, k, v, backend="sdpa"), out)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_gradcheck_of_the_reference(mask: dict[str, Any]) -> None:
    mask = {**mask, **({"documents": documents_of([3, 4], 1)} if "documents" in mask else {})}
    mask = {
        **mask,
        **({"window": 2} if "window" in mask else {}),
        **({"slopes": SLOPES[:2]} if "slopes" in mask else {}),
    }
    arguments = [t.requires_grad_() for t in qkv(1, 7, 2, 1, 3, torch.float64)]
    assert torch.autograd.gradcheck(functools.partial(attention_lse_reference, **mask), arguments)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_lengths_with_slopes(backend: str) -> None:
    q, k, v = qkv(2, 31, 4, 2, 16, torch.float32)
    q = q[:, :12]
    together = attention(q, k, v, lengths=torch.tensor([31, 17]), slopes=SLOPES, backend=backend)
    for row, length in enumerate((31, 17)):
        own = [q[row : row + 1], k[row : row + 1, :length], v[row : row + 1, :length]]
        alone = attention(*own, slopes=SLOPES, backend="reference")
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("extras", [{}, {"slopes": SLOPES}], ids=["plain", "slopes"])
def test_documents_in_several_pieces_are_masked(extras: dict[str, Any]) -> None:
    documents = torch.tensor([[0] * 20 + [1] * 20 + [0] * 20])
    arguments = qkv(1, 60, 4, 2, 24, torch.float32)
    options = {"documents": documents, **extras}
    check_against_plain(functools.partial(attention, **options), functools.partial(plain, **options), arguments)
    with pytest.raises(ValueError, match="documents has a document in several pieces; backend cpu takes"):
        attention(*arguments, **options, backend="cpu")
    with pytest.raises(Exception, match="documents has a document in several pieces"):
        torch.compile(functools.partial(attention, **options), backend="aot_eager")(*arguments)


def test_compiles_without_a_graph_break_and_with_lse() -> None:
    op = functools.partial(with_lse, documents=documents_of([11, 29], 1), slopes=SLOPES)
    arguments = qkv(1, 40, 4, 2, 16, torch.float32)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_same_bits(run_with_gradients(compiled, arguments), run_with_gradients(op, arguments))


def test_the_rule_catches_a_slope_of_the_wrong_head() -> None:
    """Negative control."""
    turned = functools.partial(attention, slopes=SLOPES.flip(0))
    with pytest.raises(AssertionError, match="output 0"):
        check_against_plain(turned, functools.partial(plain, slopes=SLOPES), qkv(1, 50, 4, 2, 24, torch.float32))


def shaped(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


Q, K = shaped(2, 8, 4, 16), shaped(2, 8, 2, 16)
BAD: list[tuple[str, tuple[Tensor, ...], dict[str, Any]]] = [
    (r"attention: q is \[8, 4, 16\] fp32 on cpu; it takes \[B, Sq, H, D\]", (shaped(8, 4, 16), K, K), {}),
    (r"attention: q is \[2, 8, 4, 16\] int64 on cpu; it takes", (Q.long(), K.long(), K.long()), {}),
    (r"attention: k is \[2, 8, 2, 8\] fp32 on cpu; it takes", (Q, shaped(2, 8, 2, 8), K), {}),
    (r"attention: k is \[1, 8, 2, 16\] fp32 on cpu; it takes", (Q, K[:1], K[:1]), {}),
    (r"attention: k is .* it takes heads that divide q's 4", (Q, shaped(2, 8, 3, 16), shaped(2, 8, 3, 16)), {}),
    (r"attention: v is \[2, 7, 2, 16\] fp32 on cpu; it takes k's shape", (Q, K, K[:, :7]), {}),
    (r"attention: v is .* bf16 on cpu; it takes the dtype and device of q, fp32 on cpu", (Q, K, K.bfloat16()), {}),
    (r"attention: k is .* on meta; it takes the dtype and device of q", (Q, K.to("meta"), K), {}),
    (r"attention: documents is \[2, 7\] int64 on cpu; it takes int", (Q, K, K), {"documents": shaped(2, 7).long()}),
    (r"attention: documents is .* it takes int", (Q, K, K), {"documents": Q[..., 0, 0]}),
    (r"attention: window is 0; it takes", (Q, K, K), {"window": 0}),
    (r"attention: window is 3; it takes", (Q, K, K), {"window": 3, "causal": False}),
    (r"attention: window is True; it takes a number", (Q, K, K), {"window": True}),
    (r"attention: q is .*, sparse_coo; it takes a dense tensor", (Q.to_sparse(), K, K), {}),
    (r"attention: v is .*, sparse_coo; it takes a dense", (Q, K, K.to_sparse()), {}),
    (r"attention: documents is .* it takes a dense", (Q, K, K), {"documents": shaped(2, 8).long().to_sparse()}),
    (r"attention: documents is .* int64 .* or boundaries int32", (Q, K, K), {"documents": shaped(2, 8, 2).long()}),
    (r"attention: lengths is \[8, 1099511627776\]; it takes", (Q, K, K), {"lengths": torch.tensor([8, 2**40])}),
    (r"attention: lengths is \[9, 8\]; it takes numbers .* to 8", (Q, K, K), {"lengths": torch.tensor([9, 8])}),
    (r"attention: lengths is \[8, 7\]; it takes .* from 8", (Q, K, K), {"lengths": torch.tensor([8, 7])}),
    (r"attention: lengths is .* it takes a dense", (Q, K, K), {"lengths": torch.tensor([8, 8]).to_sparse()}),
    (r"attention: slopes is .* it takes a dense", (Q, K, K), {"slopes": shaped(4).to_sparse()}),
    (r"attention: scale is -1.0; it takes a positive number", (Q, K, K), {"scale": -1.0}),
    (r"attention: scale is '1'; it takes a positive number", (Q, K, K), {"scale": "1"}),
    (r"attention: slopes is \[2\] fp32 on cpu; it takes fp32 \[H\] = \[4\]", (Q, K, K), {"slopes": shaped(2)}),
    (r"attention: slopes is .* it takes none: detach it", (Q, K, K), {"slopes": shaped(4).requires_grad_()}),
    (r"attention: lengths is \[3\] int64 on cpu; it takes int \[B\] = \[2\]", (Q, K, K), {"lengths": shaped(3).long()}),
    (r"attention: lengths is .* it takes causal", (Q, K, K), {"lengths": shaped(2).long(), "return_lse": True}),
    (r"attention: backend is sdpa; slopes and return_lse take", (Q, K, K), {"backend": "sdpa", "return_lse": True}),
    (r"kernels.attention=cpu cannot run for torch.float64", (Q.double(), K.double(), K.double()), {"backend": "cpu"}),
]  # fmt: skip


@pytest.mark.parametrize(("message", "arguments", "options"), BAD)
def test_bad_input_is_refused(message: str, arguments: tuple[Tensor, ...], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        attention(*arguments, **options)


def test_the_kernel_itself_refuses_what_it_cannot_read() -> None:
    for bad in ((Q, K[:, :, :1], K), (Q, shaped(2, 8, 3, 16), shaped(2, 8, 3, 16)), (Q, K.double(), K.double())):
        with pytest.raises(RuntimeError, match="attention takes"):
            torch.ops.megatron_lite_cpu.attention(*bad, None, None, 0.25, True, 0)
    for bounds, slopes in ((shaped(2, 8, 2), None), (None, shaped(3))):
        with pytest.raises(RuntimeError, match="attention takes"):
            torch.ops.megatron_lite_cpu.attention(Q, K, K, bounds, slopes, 0.25, True, 0)
