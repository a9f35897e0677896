from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite.ops import native, rotary
from megatron_lite.ops.rotary import rotary_projections, rotary_reference
from megatron_lite.ops.split_projections import split_projections
from tests.ops.oracle import (
    assert_same_bits,
    assert_within,
    check_against_plain,
    run_with_gradients,
    same_bits_for_any_threads,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
needs_native = pytest.mark.skipif(native.missing_cpu() is not None, reason=str(native.missing_cpu()))


LAYOUTS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def qk(batch: int, tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(tokens * 1000 + dim)
    return [torch.randn(batch, tokens, h, dim).to(dtype) for h in (heads, kv_heads)]


def angles(batch: int, tokens: int, num_rotated: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    theta = 100 * torch.rand(batch, tokens, num_rotated // 2, generator=generator)
    return theta.cos(), theta.sin()


def at(
    op: Callable[..., tuple[Tensor, ...]], cos: Tensor, sin: Tensor, **options: Any
) -> Callable[..., tuple[Tensor, ...]]:
    """op with its angles and options fixed, the angles in float64 for float64 inputs."""

    def apply(*inputs: Tensor) -> tuple[Tensor, ...]:
        wide = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
        return op(*inputs, cos=cos.to(wide), sin=sin.to(wide), **options)

    return apply


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("angle_batch", [1, 2])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "dim", "num_rotated"),
    [
        (1, 1, 1, 2, 2),
        (3, 4, 1, 40, 40),
        (113, 8, 4, 64, 64),
        (5, 3, 3, 118, 118),
        (7, 2, 1, 59, 30),
        (4, 2, 2, 80, 20),
    ],
)
@LAYOUTS
def test_error_is_at_most_twice_that_of_plain_torch(
    tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
    num_rotated: int,
    angle_batch: int,
    dtype: torch.dtype,
    interleaved: bool,
) -> None:
    cos, sin = angles(angle_batch, tokens, num_rotated)
    op, plain = (at(f, cos, sin, interleaved=interleaved) for f in (rotary, rotary_reference))
    inputs = qk(2, tokens, heads, kv_heads, dim, dtype)
    check_against_plain(op, plain, inputs)
    for x, rotated in zip(inputs, op(*inputs), strict=True):
        assert torch.equal(x[..., num_rotated:], rotated[..., num_rotated:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_interleaved_is_the_other_layout_of_the_same_rotation(dtype: torch.dtype) -> None:
    """Bitwise: dimensions reordered, rotated in halves, and back."""
    q, k = qk(2, 5, 3, 1, 40, dtype)
    order = torch.cat((torch.arange(0, 40, 2), torch.arange(1, 40, 2)))
    halves = at(rotary, *angles(1, 5, 40))(q[..., order], k[..., order])
    woven = at(rotary, *angles(1, 5, 40), interleaved=True)(q, k)
    assert_same_bits([x[..., order] for x in woven], halves)


@LAYOUTS
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(dtype: torch.dtype, backend: str, interleaved: bool) -> None:
    fused = torch.randn(2, 9, 5, 40).to(dtype)
    before = fused.clone()
    q, k = fused[:, :, :3], fused[:, :, 3:4]
    op = at(rotary, *angles(1, 9, 24), backend=backend, interleaved=interleaved)
    expected = op(q, k)
    with torch.no_grad():
        rotated = at(rotary, *angles(1, 9, 24), backend=backend, interleaved=interleaved, inplace=True)(q, k)
    assert rotated[0] is q and rotated[1] is k
    assert_same_bits(rotated, expected)
    assert torch.equal(fused[:, :, 4], before[:, :, 4])  # what lies beside them is left alone


def test_in_place_is_refused_where_it_would_be_wrong() -> None:
    (q, k), (cos, sin) = qk(1, 3, 2, 1, 8, torch.float32), angles(1, 3, 8)
    with pytest.raises(ValueError, match="rotary: inplace is True; it takes False where q or k has a gradient"):
        rotary(q.requires_grad_(), k, cos, sin, inplace=True)
    with pytest.raises(ValueError, match=r"rotary: k is .*no expanded dimension"):
        rotary(q.detach(), k.expand(1, 3, 4, 8), cos, sin, inplace=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_of_a_fused_projection(dtype: torch.dtype) -> None:
    fused = torch.randn(2, 9, 6 * 40).to(dtype)
    q, k, _ = (part.unflatten(-1, (-1, 40)) for part in fused.split([160, 40, 40], dim=-1))
    assert not q.is_contiguous()
    op = at(rotary, *angles(1, 9, 40))
    assert_same_bits(op(q, k), op(q.contiguous(), k.contiguous()))
    check_against_plain(op, at(rotary_reference, *angles(1, 9, 40)), [q, k])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scores_depend_on_the_distance_alone(dtype: torch.dtype) -> None:
    """The defining property: <rotate(q, m), rotate(k, n)> is a function of m - n. And position 0 is the identity."""
    q, k = (t[:, :1].expand(-1, 12, -1, -1) for t in qk(1, 12, 1, 1, 16, torch.float64))
    theta = torch.arange(12.0, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(0, 16, 2).double() / 16)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q_rotated, k_rotated = rotary(q.to(dtype), k.to(dtype), theta.cos()[None].to(wide), theta.sin()[None].to(wide))
    scores = torch.einsum("bmhd,bnhd->mn", q_rotated, k_rotated)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5  # a few roundings of scores of order ten
    torch.testing.assert_close(scores[3:, 3:], scores[:-3, :-3], rtol=0, atol=tolerance)
    assert (scores[0, 1:] - scores[0, :-1]).abs().max() > 1e-2  # the scores do differ
    assert torch.equal(q_rotated[:, 0], q[:, 0].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_and_independent_of_threads(dtype: torch.dtype) -> None:
    same_bits_for_any_threads(at(rotary, *angles(1, 301, 40)), qk(2, 301, 4, 2, 40, dtype))


@LAYOUTS
def test_gradcheck_in_float64(interleaved: bool) -> None:
    op = at(rotary, *angles(1, 3, 4), interleaved=interleaved)
    assert torch.autograd.gradcheck(op, [t.requires_grad_() for t in qk(2, 3, 2, 1, 6, torch.float64)])


def projections(dtype: torch.dtype, inplace: bool, backend: str = "auto") -> tuple[Tensor, Callable[..., Any]]:
    """qkv[T, 3 heads of q, 1 of k, 1 of v], and its rotation."""
    torch.manual_seed(0)
    shapes = [(2, 9, heads, 40) for heads in (3, 1, 1)]
    op = partial(rotary_projections, shapes=shapes, inplace=inplace, backend=backend)
    return torch.randn(18, 5 * 40).to(dtype), at(op, *angles(2, 9, 24))


def plain_projections(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    q, k, v = split_projections(qkv, [(2, 9, heads, 40) for heads in (3, 1, 1)])
    return *rotary_reference(q, k, cos, sin), v


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_projections(dtype: torch.dtype, inplace: bool, backend: str) -> None:
    qkv, op = projections(dtype, inplace, backend)
    check_against_plain(lambda x: op(x * 1), at(plain_projections, *angles(2, 9, 24)), [qkv])
    assert_same_bits(
        run_with_gradients(lambda x: op(x * 1), [qkv]),
        run_with_gradients(lambda x: projections(dtype, False, backend)[1](x), [qkv]),
    )
    with torch.no_grad():
        own = qkv.clone()
        parts = op(own)
        assert_same_bits(parts, [t.clone() for t in projections(dtype, False, backend)[1](qkv)])
        assert (parts[0].data_ptr() == own.data_ptr()) == inplace
        assert torch.equal(own, qkv) != inplace


def test_projections_in_place_are_noticed_by_whoever_saved_them() -> None:
    """autograd counts versions: a square that has saved what is then rotated refuses its backward."""
    for inplace in (False, True):
        qkv, op = projections(torch.float32, inplace)
        made = qkv.requires_grad_() * 1
        square = made.square().sum()
        total = sum(part.sum() for part in op(made)) + square
        if inplace:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                total.backward()
        else:
            total.backward()


def test_projections_compile_without_a_graph_break() -> None:
    qkv, op = projections(torch.float32, True)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    check_against_plain(lambda x: compiled(x * 1), at(plain_projections, *angles(2, 9, 24)), [qkv])


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_empty_batches(shape: tuple[int, int]) -> None:
    q, k = (torch.empty(*shape, heads, 8, requires_grad=True) for heads in (2, 1))
    cos, sin = angles(1, shape[1], 8)
    out = rotary(q, k, cos, sin)
    (out[0].sum() + out[1].sum()).backward()
    assert [t.shape for t in out] == [q.shape, k.shape]


@pytest.mark.parametrize("scale", [0.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_and_large_values(dtype: torch.dtype, scale: float) -> None:
    inputs = [(scale * x.clamp(-3, 3)).to(dtype) for x in qk(2, 9, 3, 1, 40, torch.float32)]
    check_against_plain(at(rotary, *angles(1, 9, 40)), at(rotary_reference, *angles(1, 9, 40)), inputs)


def test_bad_input() -> None:
    (q, k), (cos, sin) = qk(2, 3, 2, 1, 8, torch.float32), angles(1, 3, 8)
    for arguments, message in (
        ((q[0], k, cos, sin), r"rotary: q is \[3, 2, 8\] fp32 on cpu; it takes \[B, S, heads, D\]"),
        ((q, k[:, :2], cos, sin), r"rotary: k is \[2, 2, 1, 8\]"),
        ((q, k[..., :6], cos, sin), r"rotary: k is \[2, 3, 1, 6\]"),
        ((q, k.double(), cos, sin), "rotary: k is .*fp64.*it takes the dtype and device of q, fp32"),
        ((q.long(), k.long(), cos, sin), "rotary: q is .*int64"),
        ((q, k, cos[:, :2], sin[:, :2]), r"rotary: cos is .*it takes \[B or 1, S, R/2\] = \[2 or 1, 3, at most 4\]"),
        ((q, k, cos, sin[..., :2]), "rotary: sin is .*the same for cos and sin"),
        ((q, k, torch.ones(1, 3, 5), torch.ones(1, 3, 5)), "rotary: cos is .*at most 4"),
        ((q, k, torch.ones(3, 3, 4), torch.ones(3, 3, 4)), "rotary: cos is .*2 or 1"),
        ((q, k, cos.bfloat16(), sin), "rotary: cos is .*bf16.*it takes fp32"),
    ):
        with pytest.raises(ValueError, match=message):
            rotary(*arguments)
    with pytest.raises(ValueError, match=r"kernels\.rotary=apex"):
        rotary(q, k, cos, sin, backend="apex")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saves_only_the_angles(dtype: torch.dtype) -> None:
    q, k = (t.requires_grad_() for t in qk(1, 3, 2, 1, 8, dtype))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cos, sin = (t.to(wide) for t in angles(1, 3, 8))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rotary(q, k, cos, sin)
    assert {t.data_ptr() for t in saved} == {cos.data_ptr(), sin.data_ptr()}


@needs_native
@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("isa", [0, 1, 2, 3], ids=["portable", "avx2", "avx512", "avx512bf16"])
def test_every_instruction_set(isa: int, dtype: torch.dtype, interleaved: bool) -> None:
    for dim, num_rotated in ((40, 40), (128, 128), (59, 14), (70, 66)):
        (q, k), (cos, sin) = qk(2, 9, 3, 1, dim, dtype), angles(2, 9, num_rotated)
        outputs = torch.empty_like(q), torch.empty_like(k)
        torch.ops.megatron_lite_cpu.rotary(q, k, cos, sin, interleaved, False, *outputs, isa)
        exact = rotary_reference(q.double(), k.double(), cos.double(), sin.double(), interleaved)
        plain = rotary_reference(q, k, cos, sin, interleaved)
        for name, actual, p, e in zip(("q", "k"), outputs, plain, exact, strict=True):
            assert_within(name, actual, p, e, factor=2.0)


@needs_native
def test_operator_registrations() -> None:
    (q, k), (cos, sin) = qk(2, 9, 3, 1, 40, torch.float32), angles(1, 9, 24)
    for inverse in (False, True):
        arguments = (q.requires_grad_(), k, cos, sin, True, inverse)
        torch.library.opcheck(torch.ops.megatron_lite.rotary_cpu.default, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiles_without_a_graph_break(dtype: torch.dtype) -> None:
    op = at(rotary, *angles(1, 9, 40))
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    check_against_plain(compiled, at(rotary_reference, *angles(1, 9, 40)), qk(2, 9, 3, 1, 40, dtype))


def test_the_rule_catches_a_backward_by_the_wrong_angle() -> None:
    """Negative control: forward right, backward rotating by plus the angle."""
    cos, sin = angles(1, 5, 16)

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k):  # type: ignore[no-untyped-def]
            return rotary(q, k, cos, sin)

        @staticmethod
        def backward(ctx, dq, dk):  # type: ignore[no-untyped-def]
            return rotary(dq, dk, cos, sin)

    with pytest.raises(AssertionError, match="gradient of input 0"):
        check_against_plain(Wrong.apply, at(rotary_reference, cos, sin), qk(1, 5, 2, 1, 16, torch.float32))


@pytest.mark.parametrize("name", ["cos", "sin"])
def test_angles_that_want_a_gradient_are_refused(name: str) -> None:
    """They would get none. Where no gradients are taken, none is missed."""
    x, (cos, sin) = torch.randn(1, 3, 2, 8), angles(1, 3, 8)
    {"cos": cos, "sin": sin}[name].requires_grad_()
    message = rf"rotary: {name} is \[1, 3, 4\] fp32 on cpu and requires a gradient"
    with pytest.raises(ValueError, match=message):
        rotary(x, x, cos, sin)
    qkv, shapes = torch.randn(3, 24), [(1, 3, 1, 8)] * 3
    with pytest.raises(ValueError, match=message):
        rotary_projections(qkv, shapes, cos, sin)
    with torch.no_grad():
        assert not rotary(x, x, cos, sin)[0].requires_grad
