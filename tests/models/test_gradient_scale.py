"""The factor on a gradient alone, and where the model applies it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_lite.models.gradient_scale import scale_gradient
from tests.models.tiny import filled, model_config, token_ids


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_forward_is_the_identity_and_backward_one_product(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(7, 5, generator=generator).to(dtype) for _ in range(2))
    leaf = x.clone().requires_grad_()
    out = scale_gradient(leaf, 0.1)
    assert torch.equal(out, x) and out.dtype == dtype
    out.backward(upstream)
    assert leaf.grad is not None and leaf.grad.dtype == dtype
    assert torch.equal(leaf.grad, upstream * 0.1) and not torch.equal(leaf.grad, upstream)


def test_a_factor_of_one_is_not_in_the_graph() -> None:
    leaf = torch.ones(3, requires_grad=True)
    assert scale_gradient(leaf, 1.0) is leaf


def gradients(family: str, scale: float) -> tuple[Tensor, dict[str, Tensor]]:
    model = filled(model_config(family), torch.float32)
    assert model.embedding is not None
    model.embedding.gradient_scale = scale
    tokens = token_ids(2, 9)
    sequences = model.sequences(2, 8, None, None, torch.empty(()))
    loss = model(tokens[:, :-1], sequences, tokens[:, 1:])
    loss.backward()
    return loss.detach(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_only_the_token_table_is_scaled(family: str) -> None:
    """Learned positions (gpt2) and the head are not; a power of two, so that the product is exact in every bit."""
    loss, plain = gradients(family, 1.0)
    scaled_loss, scaled = gradients(family, 0.25)
    assert torch.equal(loss, scaled_loss) and plain.keys() == scaled.keys()
    assert ("embedding.positions.weight" in plain) == (family == "gpt2")
    for name, gradient in plain.items():
        factor = 0.25 if name == "embedding.tokens.weight" else 1.0
        assert torch.equal(scaled[name], factor * gradient) and gradient.any(), name
