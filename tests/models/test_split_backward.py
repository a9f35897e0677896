"""The gradient of the input first and those of the linear layers' weights later, in a whole model."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from megatron_lite.models.recompute import Recompute
from megatron_lite.models.transformer import Transformer
from megatron_lite.ops.linear import WeightGradients, _Product, defer_weight_gradients
from tests.models.backwards import (
    BATCH,
    DOCUMENTS,
    LENGTH,
    SPLIT,
    Allocations,
    differing,
    forward,
    gradients,
    on_bucket,
)
from tests.models.tiny import filled, model_config, token_ids

T = BATCH * LENGTH
LINEAR = ("attention.qkv.weight", "attention.out.weight", "mlp.up.weight", "mlp.down.weight")
RECOMPUTES = [Recompute(), Recompute("selective"), Recompute("full"), Recompute("full", 2)]
of_every_mode = pytest.mark.parametrize("recompute", RECOMPUTES, ids=lambda r: f"{r.mode}-{r.every_layers}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_gradients_are_those_of_a_whole_backward_in_every_bit(family: str, dtype: torch.dtype) -> None:
    config = model_config(family)
    expected = gradients(config, dtype)
    assert differing(gradients(config, dtype, order=SPLIT), expected) == []
    # Controls: a half that is not run, and weight halves in another order of microbatches. It shows in the weights of
    # linear layers alone: all else has its gradient in the first half. (Three bf16 numbers add exactly in fp32.)
    linear = [name for name in expected if name.endswith(LINEAR)]
    assert len(linear) == 8
    assert differing(gradients(config, dtype, order=SPLIT[:-1]), expected) == linear
    if dtype == torch.float32:
        assert differing(gradients(config, dtype, order=("I0", "I1", "I2", "W2", "W1", "W0")), expected) == linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_until_its_weight_half_runs_a_linear_layer_has_no_gradient(dtype: torch.dtype) -> None:
    found = gradients(model_config(), dtype, order=["I0", "I1", "I2"])
    assert all(bool(value.any()) != name.endswith(LINEAR) for name, value in found.items())


def held(store: WeightGradients) -> list[Tensor]:
    """What the store keeps of all microbatches."""
    return [tensor for products in store._owed.values() for p in products for tensor in (p._x, p._grad)]


@of_every_mode
def test_between_the_halves_x_and_the_gradient_of_each_linear_layer_are_held_and_nothing_else(
    recompute: Recompute,
) -> None:
    config = model_config()
    model, store = filled(config, torch.float32), WeightGradients()
    model.recompute = recompute
    bucket = on_bucket(model)
    defer_weight_gradients(model, store)
    permanent = [bucket.gradients.kept, DOCUMENTS, *model.parameters()]
    memory = Allocations()
    with memory:
        loss = forward(model, 0)
        alive_after_forward = memory.alive(permanent)
        with store.collecting(0):
            loss.backward()
        del loss
    owed = held(store)
    sizes = sorted(tensor.numel() for tensor in owed)
    qkv, ffn = 32 + 2 * 8, 48
    layer = [T * 32, T * qkv, T * 32, T * 32, T * 32, T * 2 * ffn, T * ffn, T * 32]  # x and gradient of each
    assert sizes == sorted(2 * layer)
    assert all(tensor.untyped_storage().nbytes() == 4 * tensor.numel() and tensor.grad_fn is None for tensor in owed)
    # The gradient of the MLP's output is that of the residual stream: of two layers one tensor each is held once.
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in owed}
    assert memory.alive(permanent) == sum(storages.values())
    assert recompute.mode == "full" or memory.alive(permanent) < alive_after_forward, "control: it sees a graph"
    # The second half frees them one by one.
    references = [weakref.ref(tensor) for tensor in owed]
    del owed
    alive_at_start: list[int] = []
    start = _Product.start

    def counted(product: _Product) -> None:
        alive_at_start.append(sum(reference() is not None for reference in references))
        start(product)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Product, "start", counted)
        store.run(0)
    # A product is started, which may gather, when of those before it only the last is still to be computed: nothing
    # that is done is alive.
    assert alive_at_start == [16, *range(16, 2, -2)]
    assert memory.alive(permanent) == 0 and not store.owed


def test_the_output_of_a_chunk_is_free_once_it_is_sent_while_its_graph_waits_for_a_gradient() -> None:
    """An edge into the graph is all that a backward needs; with the tensor itself its memory would be kept."""
    config = model_config()
    gradient = torch.randn(T, config.hidden_size, generator=torch.Generator().manual_seed(0))
    for recompute in RECOMPUTES:
        model = first_chunk()
        model.recompute = recompute
        tokens = token_ids(BATCH, LENGTH)
        bucket = on_bucket(model)
        permanent = [bucket.gradients.kept, DOCUMENTS, tokens, gradient, *model.parameters()]
        sequences = model.sequences(BATCH, LENGTH, None, DOCUMENTS, model.layers["0"].mlp.up.weight)

        output = model(tokens, sequences)
        output.backward(gradient)
        expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.zero_()

        memory = Allocations()
        with memory:
            output = model(tokens, sequences)
        reference, size = weakref.ref(output.untyped_storage()), output.untyped_storage().nbytes()
        edge = torch.autograd.graph.get_gradient_edge(output)
        with_output = memory.alive()
        assert reference() is not None, "control: as long as somebody has the tensor, it is there"
        del output
        assert reference() is None, "the graph keeps the output"
        assert with_output - memory.alive() == size == 4 * T * config.hidden_size
        torch.autograd.backward(edge, gradient)
        assert differing({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, expected) == []
        del edge, sequences
        assert memory.alive(permanent) == 0


def first_chunk() -> Transformer:
    model = filled(model_config(), torch.float32)
    model.final_norm = model.head = None
    return model


def test_saved_tensor_hooks_do_not_hide_the_gradient_that_a_product_adds_to() -> None:
    """They hand a copy of the weight to backward, which has no gradient to add to: the sums would have other bits."""
    expected = gradients(model_config(), torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor):
        assert differing(gradients(model_config(), torch.float32), expected) == []
