from __future__ import annotations

import pytest
import torch

from megatron_lite.ops.linear import linear, linear_reference


def _tensors(dtype: torch.dtype, bias: bool) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (3, 5), (3,)][: 3 if bias else 2]
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes)


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_the_definition(bias: bool) -> None:
    assert torch.autograd.gradcheck(linear, _tensors(torch.float64, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_without_a_gradient_to_add_to_it_is_plain_linear(dtype: torch.dtype) -> None:
    ours, plain = _tensors(dtype, True), _tensors(dtype, True)
    linear(*ours).sum().backward()
    linear_reference(*plain).sum().backward()
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_the_product_adds_to_the_gradient_that_is_there() -> None:
    x, weight = _tensors(torch.float64, False)
    weight.grad = flat = torch.ones_like(weight)
    linear(x, weight).sum().backward()
    linear(x, weight).sum().backward()
    assert weight.grad is flat, "the gradient must stay where it was, in the flat bucket"
    torch.testing.assert_close(flat, 1 + 2 * x.detach().sum(0).expand_as(weight), rtol=1e-13, atol=0)


def test_a_gradient_of_another_dtype_is_left_to_autograd() -> None:
    x, weight = _tensors(torch.bfloat16, False)
    total = torch.zeros(weight.shape)

    def accumulate(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        total.add_(parameter.grad)
        parameter.grad = None

    weight.register_post_accumulate_grad_hook(accumulate)
    linear(x, weight).sum().backward()
    assert total.abs().sum() > 0
