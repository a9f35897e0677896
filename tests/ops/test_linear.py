from __future__ import annotations

from functools import partial

import pytest
import torch

from megatron_lite.models.transformer import Linear
from megatron_lite.ops import linear as linear_module
from megatron_lite.ops.linear import (
    WeightGradients,
    defer_weight_gradients,
    linear,
    linear_reference,
    weight_gradient,
)


def _tensors(dtype: torch.dtype, bias: bool) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (3, 5), (3,)][: 3 if bias else 2]
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes)


@pytest.mark.parametrize("saves_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_the_definition(bias: bool, saves_first: bool) -> None:
    assert torch.autograd.gradcheck(partial(linear, saves_first=saves_first), _tensors(torch.float64, bias))


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


def _split(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    grad: torch.Tensor,
    saves_first: bool = False,
) -> WeightGradients:
    store = WeightGradients()
    with store.collecting("m"):
        linear(x, weight, bias, store, saves_first).backward(grad)
    return store


@pytest.mark.parametrize("saves_first", [False, True])
@pytest.mark.parametrize("has_gradient", [False, True], ids=["first microbatch", "added"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_split_backward_has_the_bits_of_a_whole_one(
    dtype: torch.dtype, has_gradient: bool, saves_first: bool
) -> None:
    grad = torch.randn(7, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole, split = _tensors(dtype, True), _tensors(dtype, True)
    if has_gradient:
        for _, weight, _ in (whole, split):
            weight.grad = torch.full_like(weight, 0.3)
    linear(*whole).backward(grad)
    before = None if split[1].grad is None else split[1].grad.clone()
    store = _split(*split, grad, saves_first)
    assert split[0].grad is not None and split[2].grad is not None, "the input and the bias have theirs at once"
    assert torch.equal(split[1].grad, before) if before is not None else split[1].grad is None
    assert store.owed == ("m",)
    store.run("m")
    assert store.owed == ()
    for one, other in zip(split, whole, strict=True):
        assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad)


def test_a_late_gradient_goes_through_the_hooks_of_the_weight_and_is_not_copied() -> None:
    x, weight = _tensors(torch.bfloat16, False)
    seen: list[torch.Tensor | None] = []
    weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad))
    store, made = _split(x, weight, None, torch.ones(7, 3, dtype=torch.bfloat16)), []
    (product,) = store._owed["m"]
    with pytest.MonkeyPatch.context() as patch:
        gradient = weight_gradient(weight, product._grad, product._x)
        assert gradient is not None
        made.append(gradient.data_ptr())
        results = [gradient]
        del gradient
        patch.setattr(linear_module, "weight_gradient", lambda *_: results.pop())
        store.run("m")
    # Autograd calls hooks in the first half as well, with nothing; bucket.py leaves that out.
    assert seen[0] is None and seen[1] is not None and len(seen) == 2
    assert seen[1].data_ptr() == made[0]


def test_outside_of_collecting_nothing_is_put_off() -> None:
    x, weight = _tensors(torch.float32, False)
    store = WeightGradients()
    linear(x, weight, None, store).sum().backward()
    assert weight.grad is not None and store.owed == ()


def test_an_input_without_a_gradient_is_saved_as_any_other() -> None:
    x, weight = _tensors(torch.float32, False)
    linear(x.detach(), weight, saves_first=True).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(3, -1))


def test_what_is_saved_first_must_not_be_written_to() -> None:
    for index in range(2):
        tensors = _tensors(torch.float32, False)
        y = linear(*tensors, saves_first=True)
        with torch.no_grad():
            tensors[index].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_a_frozen_weight_owes_nothing() -> None:
    x, weight = _tensors(torch.float32, False)
    store = _split(x, weight.requires_grad_(False), None, torch.ones(7, 3))
    assert len(store._owed["m"]) == 0
    store.run("m")
    assert weight.grad is None


def test_misuse_of_the_store_is_noticed() -> None:
    x, weight = _tensors(torch.float32, False)
    store = _split(x, weight, None, torch.ones(7, 3))
    with pytest.raises(AssertionError, match="have been collected and not computed"), store.collecting("m"):
        pass
    with pytest.raises(AssertionError, match="within another backward"), store.collecting(1), store.collecting(2):
        pass
    assert not store.is_collecting and store.owed == ("m",), "a backward that failed owes nothing"
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(AssertionError, match="written to before its weight gradient"):
        store.run("m")
    with pytest.raises(KeyError):
        store.run("m")


@pytest.mark.parametrize("has_store", [False, True])
def test_compiles_whole(has_store: bool) -> None:
    """Nothing is put off in compiled code: all gradients come with the first half."""
    layer, plain = (Linear(5, (3,), bias=True) for _ in range(2))
    x, weight, bias = _tensors(torch.float32, True)
    for module in (layer, plain):
        with torch.no_grad():
            module.weight.copy_(weight)
            assert module.bias is not None
            module.bias.copy_(bias)
    store = WeightGradients()
    defer_weight_gradients(layer, store if has_store else None)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with store.collecting(0):
        compiled(x).square().sum().backward()
    store.run(0)
    plain(x).square().sum().backward()
    assert layer.weight.grad is not None and plain.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
