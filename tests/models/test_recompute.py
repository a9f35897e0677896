"""Recomputation changes what is saved, and no bit of a gradient."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.models import transformer
from megatron_lite.models.cache import Past
from megatron_lite.models.recompute import Recompute, recomputed
from megatron_lite.models.transformer import Transformer
from megatron_lite.ops.attention import attention
from megatron_lite.ops.rotary import rotary_projections
from tests.models.backwards import BATCH, LENGTH, SPLIT, differing, forward, gradients, saved_bytes
from tests.models.tiny import FAMILIES, filled, model_config, token_ids

LAYERS, T, HIDDEN, HEADS = 3, BATCH * LENGTH, 32, 8
NONE, SELECTIVE, FULL, BY_TWO = Recompute(), Recompute("selective"), Recompute("full"), Recompute("full", 2)
BY_FIVE = Recompute("full", 5)  # more than there are layers: one group
of_every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@of_every_family
def test_no_bit_of_a_gradient_changes(family: str, dtype: torch.dtype) -> None:
    config = model_config(family, num_layers=LAYERS)
    for is_packed in (True, False):
        expected = gradients(config, dtype, is_packed=is_packed)
        for mode in (SELECTIVE, FULL, BY_TWO, BY_FIVE):
            assert differing(gradients(config, dtype, recompute=mode, is_packed=is_packed), expected) == [], mode
            if is_packed:
                assert differing(gradients(config, dtype, recompute=mode, order=SPLIT), expected) == [], mode


def test_recomputing_from_other_inputs_shows() -> None:
    """Control: a group that is recomputed from what is not its input has other gradients."""
    config = model_config(num_layers=LAYERS)

    def disturbed(function: Any, layers: Any, x: Tensor, *others: Any) -> Tensor:
        def call(x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            result: Tensor = function(layers, x if calls == 1 else x * (1 + 2**-20), *others)
            return result

        calls = 0
        return recomputed(call, x)

    expected = gradients(config, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_lite.models.recompute.recomputed", disturbed)
        assert len(differing(gradients(config, torch.float32, recompute=FULL), expected)) > LAYERS * 4


def test_what_is_recomputed_from_must_not_be_rotated_in_place() -> None:
    """Selective recomputation starts behind the rotation. Started before it, it would rotate a second time."""
    model = filled(model_config(), torch.float32)
    sequences = model.sequences(BATCH, LENGTH, None, None, torch.empty(()))
    assert sequences.rotary is not None
    shapes = [(BATCH, LENGTH, heads, 4) for heads in (HEADS, 2, 2)]
    x, weight = torch.randn(T, HIDDEN), torch.randn(48, HIDDEN, requires_grad=True)

    def core(qkv: Tensor, angles: tuple[Tensor, Tensor], inplace: bool) -> Tensor:
        return attention(*rotary_projections(qkv, shapes, *angles, inplace=inplace))

    def gradient(mixed: Tensor) -> Tensor:
        return torch.autograd.grad(mixed.square().sum(), weight)[0]

    expected = gradient(core(x @ weight.t(), sequences.rotary, True))
    assert torch.equal(gradient(recomputed(core, x @ weight.t(), sequences.rotary, False)), expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(recomputed(core, x @ weight.t(), sequences.rotary, True))
    # Where autograd does not see what is written, it goes through, and is wrong.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd.graph, "increment_version", lambda _: None)
        assert not torch.equal(gradient(recomputed(core, x @ weight.t(), sequences.rotary, True)), expected)


def saved_by_layers(family: str, mode: Recompute, backend: str = "auto", batch: int = BATCH) -> int:
    """Bytes that three layers save of a microbatch."""
    model = layers_alone(family, backend)
    model.recompute = mode
    sequences = model.sequences(batch, LENGTH, None, None, torch.empty(()))
    with saved_bytes(model) as sizes:
        model(torch.zeros(batch * LENGTH, HIDDEN, requires_grad=True), sequences)
    return sum(sizes.values())


def layers_alone(family: str, backend: str) -> Transformer:
    model = filled(model_config(family, num_layers=LAYERS), torch.float32, backend)
    model.embedding = model.final_norm = model.head = None
    return model


@of_every_family
def test_bytes_saved(family: str) -> None:
    activation = 4 * T * HIDDEN
    assert saved_by_layers(family, FULL) == 3 * activation
    assert saved_by_layers(family, BY_TWO) == 2 * activation  # layers 0 and 1, and layer 2
    assert saved_by_layers(family, BY_FIVE) == activation
    none, selective = (saved_by_layers(family, mode) for mode in (NONE, SELECTIVE))
    assert selective > 10 * 3 * activation
    statistics = none - selective
    if family != "mistral":  # whose window torch's kernels have as a mask, where ours are not built
        per_query = 4 * BATCH * HEADS * LENGTH
        assert statistics in (3 * per_query, 3 * 2 * per_query)  # log-sum-exp, or maximum and sum of our CPU kernel
    # The reference holds scores and weights of all pairs, and the fp32 inputs that it has made of each head.
    scores = 4 * BATCH * HEADS * LENGTH**2
    assert saved_by_layers(family, NONE, "reference") - saved_by_layers(family, SELECTIVE, "reference") > 3 * 2 * scores
    assert saved_by_layers(family, SELECTIVE, "reference") == selective


class Calls:
    """Counts the calls of attention by the model."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        patch.setattr(transformer, "attention", self._attention)

    def _attention(self, *args: Any, **kwargs: Any) -> Tensor:
        self.count += 1
        return attention(*args, **kwargs)


@pytest.mark.parametrize("mode", [NONE, SELECTIVE, FULL, BY_TWO], ids=lambda r: f"{r.mode}-{r.every_layers}")
def test_only_a_backward_recomputes(mode: Recompute, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, model = Calls(monkeypatch), filled(model_config(num_layers=LAYERS), torch.float32)
    model.recompute = mode
    with torch.no_grad():
        evaluated = forward(model, 0)
    loss = forward(model, 0)
    assert torch.equal(loss, evaluated) and calls.count == 2 * LAYERS
    loss.backward()
    assert calls.count == (2 if mode == NONE else 3) * LAYERS


def test_generation_writes_to_its_cache_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, model = Calls(monkeypatch), filled(model_config(num_layers=LAYERS), torch.float32)
    results = []
    for mode in (NONE, SELECTIVE, FULL):
        model.recompute, calls.count = mode, 0
        past = Past(model.new_cache(BATCH, LENGTH, torch.empty(())), LENGTH)
        with torch.no_grad():
            sequences = model.sequences(BATCH, LENGTH, None, None, torch.empty(()), past)
            hidden = model.hidden(token_ids(BATCH, LENGTH), sequences)
        assert calls.count == LAYERS
        results.append((hidden, past.cache.keys))
    for hidden, keys in results[1:]:
        assert torch.equal(hidden, results[0][0]) and torch.equal(keys, results[0][1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("all", 1), "recompute: mode is 'all'; it takes one of none, selective, full"),
        (("full", 0), "recompute: every_layers is 0; it takes 1 and more"),
    ],
)
def test_settings_that_are_none(arguments: tuple[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recompute(*arguments)


class Products:
    """Counts the products of activations and weights, by the shape of the weight, that a forward makes."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.counts: Counter[tuple[int, ...]] = Counter()
        original = F.linear

        def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            self.counts[tuple(weight.shape)] += 1
            return original(x, weight, bias)

        patch.setattr(F, "linear", counted)


@pytest.mark.parametrize(("mode", "num_groups"), [(FULL, 3), (BY_TWO, 2), (BY_FIVE, 1)])
def test_the_last_product_of_a_group_is_not_computed_again(
    mode: Recompute, num_groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = filled(model_config(num_layers=LAYERS), torch.float32)
    model.recompute = mode
    products = Products(monkeypatch)
    loss = forward(model, 0)
    products.counts.clear()
    loss.backward()
    down = (HIDDEN, 48)
    assert products.counts.pop(down, 0) == LAYERS - num_groups
    assert products.counts == {(48, HIDDEN): LAYERS, (HIDDEN, HIDDEN): LAYERS, (96, HIDDEN): LAYERS}
