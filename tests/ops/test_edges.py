"""What holds for several ops at their edges: tensors without numbers, names that are none, memory written twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_lite.ops import attention, gelu, layer_norm, rms_norm, swiglu
from megatron_lite.ops.cross_entropy import cross_entropy
from megatron_lite.ops.cross_entropy_shard import VocabularyShard
from megatron_lite.ops.linear_cross_entropy import linear_cross_entropy
from megatron_lite.ops.rotary import rotary, rotary_projections


def _angles(tokens: int, half: int) -> tuple[Tensor, Tensor]:
    theta = torch.rand(1, tokens, half)
    return theta.cos(), theta.sin()


def _attend(x: Tensor) -> Tensor:
    q = x.view(1, 4, 2, 8)
    return attention(q, q, q, documents=torch.zeros(1, 4, dtype=torch.int64))


OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "rms_norm": lambda x: rms_norm(x, torch.ones(16), 1e-5),
    "layer_norm": lambda x: layer_norm(x, torch.ones(16), torch.zeros(16), 1e-5),
    "swiglu": swiglu,
    "gelu": gelu,
    "attention": _attend,
    "linear_cross_entropy": lambda x: linear_cross_entropy(x, torch.ones(9, 16), torch.zeros(4, dtype=torch.int64)),
}


@pytest.mark.parametrize("wants_grad", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_fake_tensors_have_the_shape_of_real_ones(op: str, wants_grad: bool) -> None:
    with torch.set_grad_enabled(wants_grad):
        real = OPS[op](torch.randn(4, 16, requires_grad=wants_grad))
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = OPS[op](torch.randn(4, 16, requires_grad=wants_grad))
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


def test_rotation_in_place_is_seen_by_autograd() -> None:
    """What an earlier operation saved for its backward has changed since."""
    q, k, scale = torch.randn(1, 3, 2, 8), torch.randn(1, 3, 1, 8), torch.ones(8, requires_grad=True)
    product = q * scale
    with torch.no_grad():
        rotary(q, k, *_angles(3, 4), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_an_expanded_projection_is_not_rotated_in_place() -> None:
    qkv = torch.randn(1, 32).expand(3, 32)
    shapes = [(1, 3, 2, 8), (1, 3, 1, 8), (1, 3, 1, 8)]
    with pytest.raises(ValueError, match="rotary"):
        rotary_projections(qkv, shapes, *_angles(3, 4), inplace=True)


def test_a_backend_that_is_none_is_refused_for_an_empty_batch_too() -> None:
    q = torch.randn(0, 4, 2, 8)
    with pytest.raises(ValueError, match=r"kernels\.attention=flash: no such backend"):
        attention(q, q, q, backend="flash")


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="reduction"):
        cross_entropy(torch.randn(2, 5), torch.zeros(2, dtype=torch.int64), reduction="mean")


def test_a_shard_may_have_no_rows() -> None:
    shard = VocabularyShard(0, 0, 7)
    loss = linear_cross_entropy(
        torch.randn(3, 4), torch.empty(0, 4), torch.full((3,), -100, dtype=torch.int64), shard=shard
    )
    assert loss == 0
