from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_lite.ops import native, rotary
from megatron_lite.ops.rotary import rotary_reference
from tests.ops.oracle import assert_same_bits, assert_within, check_against_plain, run_with_gradients

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
needs_native = pytest.mark.skipif(native.missing_cpu() is not None, reason=str(native.missing_cpu()))


def qk(batch: int, tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(tokens * 1000 + dim)
    return [torch.randn(batch, tokens, h, dim).to(dtype) for h in (heads, kv_heads)]


def angles(batch: int, tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    theta = 100 * torch.rand(batch, tokens, dim // 2, generator=generator)
    return theta.cos(), theta.sin()


def at(op: Callable[..., tuple[Tensor, Tensor]], cos: Tensor, sin: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """op with its angles fixed, in float64 for float64 inputs."""

    def apply(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        return op(q, k, cos.to(wide), sin.to(wide))

    return apply


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("angle_batch", [1, 2])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "dim"), [(1, 1, 1, 2), (3, 4, 1, 40), (113, 8, 4, 64), (5, 3, 3, 118)]
)
def test_error_is_at_most_twice_that_of_plain_torch(
    tokens: int, heads: int, kv_heads: int, dim: int, angle_batch: int, dtype: torch.dtype
) -> None:
    cos, sin = angles(angle_batch, tokens, dim)
    check_against_plain(
        at(rotary, cos, sin), at(rotary_reference, cos, sin), qk(2, tokens, heads, kv_heads, dim, dtype)
    )


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
    op, arguments = at(rotary, *angles(1, 301, 40)), qk(2, 301, 4, 2, 40, dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run_with_gradients(op, arguments)
        torch.set_num_threads(2)
        two = run_with_gradients(op, arguments)
    finally:
        torch.set_num_threads(before)
    assert_same_bits(one, two)


def test_gradcheck_in_float64() -> None:
    op = at(rotary, *angles(1, 3, 4))
    assert torch.autograd.gradcheck(op, [t.requires_grad_() for t in qk(2, 3, 2, 1, 4, torch.float64)])


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
@pytest.mark.parametrize("isa", [0, 1, 2], ids=["portable", "avx2", "avx512"])
def test_every_instruction_set(isa: int) -> None:
    (q, k), (cos, sin) = qk(2, 9, 3, 1, 40, torch.float32), angles(2, 9, 40)
    actual = torch.ops.megatron_lite_cpu.rotary(q, cos, sin, False, isa)
    expected = rotary_reference(q.double(), k.double(), cos.double(), sin.double())[0]
    assert_within("q", actual, rotary_reference(q, k, cos, sin)[0], expected, factor=2.0)


@needs_native
def test_operator_registrations() -> None:
    (q, _), (cos, sin) = qk(2, 9, 3, 1, 40, torch.float32), angles(1, 9, 40)
    for inverse in (False, True):
        torch.library.opcheck(torch.ops.megatron_lite.rotary_cpu.default, (q.requires_grad_(), cos, sin, inverse))


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
