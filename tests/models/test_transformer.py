from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.config.schema import KernelsConfig
from megatron_lite.models import transformer
from megatron_lite.models.transformer import Transformer, activation_of
from megatron_lite.ops.rotary import rotary_projections, rotary_reference
from megatron_lite.ops.split_projections import split_projections_reference
from tests.models.tiny import filled, model_config, token_ids

F64 = torch.float64
of_every_family = pytest.mark.parametrize("family", ["llama", "gpt2"])
FIRST, LENGTH = 5, 12  # a sequence of two documents: tokens 0..4 and 5..11
DOCUMENTS = torch.tensor([[0] * FIRST + [1] * (LENGTH - FIRST)])
POSITIONS = torch.tensor([[*range(FIRST), *range(LENGTH - FIRST)]])


def logits(
    model: Transformer, tokens: Tensor, positions: Tensor | None = None, documents: Tensor | None = None
) -> Tensor:
    """``[B, S, V]``."""
    assert model.head is not None
    like = next(model.parameters())
    batch_size, seq_len = tokens.shape
    hidden = model.hidden(tokens, model.sequences(batch_size, seq_len, positions, documents, like))
    return model.head.logits(hidden).view(*tokens.shape, -1)


def loss(model: Transformer, tokens: Tensor, targets: Tensor, documents: Tensor | None = None) -> Tensor:
    like = next(model.parameters())
    batch_size, seq_len = tokens.shape
    result: Tensor = model(tokens, model.sequences(batch_size, seq_len, None, documents, like), targets)
    return result


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@of_every_family
def test_documents_do_not_see_each_other(family: str, dtype: torch.dtype, backend: str) -> None:
    """Another first document changes no bit of the second one's logits, and every logit where nothing isolates them."""
    model = filled(model_config(family), dtype, backend)
    tokens = token_ids(1, LENGTH)
    edited = tokens.clone()
    edited[:, :FIRST] = (edited[:, :FIRST] + 13) % 97
    with torch.no_grad():
        before, after = (logits(model, x, POSITIONS, DOCUMENTS)[0] for x in (tokens, edited))
        assert torch.equal(before[FIRST:], after[FIRST:])
        assert (before[:FIRST] != after[:FIRST]).any(dim=-1).all()
        seen, seen_after = (logits(model, x, POSITIONS)[0] for x in (tokens, edited))
        assert (seen[FIRST:] != seen_after[FIRST:]).any(dim=-1).all()


@of_every_family
def test_a_packed_document_is_computed_as_if_alone(family: str) -> None:
    model, tokens = filled(model_config(family), F64), token_ids(1, LENGTH)
    with torch.no_grad():
        packed = logits(model, tokens, POSITIONS, DOCUMENTS)
        alone = torch.cat([logits(model, tokens[:, :FIRST]), logits(model, tokens[:, FIRST:])], dim=1)
        wrong = logits(model, tokens, None, DOCUMENTS)  # positions that run on
    # Sums over sequences of another length round differently.
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-12)
    # A rotation sees differences of positions only; learned positions see the positions.
    assert torch.allclose(wrong, alone, rtol=1e-10, atol=1e-10) == (family == "llama")


@of_every_family
def test_no_gradient_crosses_a_document_boundary(family: str) -> None:
    config = model_config(family, tie_embeddings=False)
    model = filled(config, F64)
    tokens = torch.arange(LENGTH)[None]  # each token has an embedding row of its own
    targets = token_ids(1, LENGTH, seed=1)
    targets[:, :FIRST] = -100  # the loss is the second document's

    def gradient(documents: Tensor | None) -> Tensor:
        assert model.embedding is not None
        (grad,) = torch.autograd.grad(loss(model, tokens, targets, documents), [model.embedding.tokens.weight])
        return grad.abs().amax(dim=1)

    isolated = gradient(DOCUMENTS)
    assert (isolated[:FIRST] == 0).all() and (isolated[FIRST:LENGTH] > 0).all()
    assert (gradient(None)[:LENGTH] > 0).all()


@of_every_family
def test_no_token_sees_those_behind_it(family: str) -> None:
    model, tokens = filled(model_config(family), torch.float32), token_ids(1, LENGTH)
    edited = tokens.clone()
    edited[0, 7] = (edited[0, 7] + 1) % 97
    with torch.no_grad():
        before, after = (logits(model, x)[0] for x in (tokens, edited))
    assert torch.equal(before[:7], after[:7])
    assert (before[7:] != after[7:]).any(dim=-1).all()


@of_every_family
def test_positions_count_from_zero_unless_given(family: str) -> None:
    model, tokens = filled(model_config(family), torch.float32), token_ids(2, LENGTH)
    with torch.no_grad():
        default = logits(model, tokens)
        assert torch.equal(default, logits(model, tokens, torch.arange(LENGTH).expand(2, -1)))
        assert not torch.allclose(default, logits(model, tokens, 2 * torch.arange(LENGTH)[None]), rtol=1e-3)


@of_every_family
def test_sequences_of_a_batch_are_independent(family: str) -> None:
    model, tokens = filled(model_config(family), F64), token_ids(3, LENGTH)
    with torch.no_grad():
        together = logits(model, tokens)
        for i in range(3):
            torch.testing.assert_close(together[i], logits(model, tokens[i : i + 1])[0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_grouped_key_value_heads_are_repeated_ones(kv_heads: int) -> None:
    """The model with kv_heads equals one with 8, in which every key and value head stands as often as it is used."""
    config = model_config(num_kv_heads=kv_heads)
    grouped, full = filled(config, F64), filled(model_config(num_kv_heads=8), F64)
    state = grouped.state_dict()
    for name, value in state.items():
        if name.endswith("qkv.weight"):
            q, k, v = value.split((8 * 4, kv_heads * 4, kv_heads * 4))
            k, v = (x.view(kv_heads, 4, -1).repeat_interleave(8 // kv_heads, dim=0).flatten(0, 1) for x in (k, v))
            state[name] = torch.cat((q, k, v))
    full.load_state_dict(state)
    tokens = token_ids(2, LENGTH)
    with torch.no_grad():
        torch.testing.assert_close(logits(grouped, tokens), logits(full, tokens), rtol=1e-12, atol=1e-12)


@of_every_family
def test_the_loss_is_the_sum_over_targets_that_are_not_ignored(family: str) -> None:
    model, tokens, targets = filled(model_config(family), F64), token_ids(2, LENGTH), token_ids(2, LENGTH, seed=1)
    targets[0, 3:6], targets[1, -1] = -100, -100
    actual = loss(model, tokens, targets)
    token_logits = logits(model, tokens).flatten(0, 1)
    expected = F.cross_entropy(token_logits, targets.flatten(), ignore_index=-100, reduction="sum")
    assert actual.dtype == F64 and actual.shape == ()
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)
    mean = F.cross_entropy(token_logits, targets.flatten(), ignore_index=-100)
    assert not torch.isclose(actual, mean)


@of_every_family
def test_the_head_is_a_parameter_of_its_own_also_where_it_is_tied(family: str) -> None:
    """Its gradient is the head's use alone: both uses together are the sum, which another room makes."""
    model = filled(model_config(family, tie_embeddings=True), F64)
    assert model.embedding is not None and model.head is not None
    embedding, head = model.embedding.tokens.weight, model.head.weight
    assert head is not embedding and head.data_ptr() != embedding.data_ptr()
    assert {"embedding.tokens.weight", "head.weight"} <= {name for name, _ in model.named_parameters()}
    with torch.no_grad():
        head.copy_(embedding)
    tokens, targets = token_ids(2, LENGTH), token_ids(2, LENGTH, seed=1)
    apart = torch.autograd.grad(loss(model, tokens, targets), [embedding, head])

    model.head.weight = embedding  # one tensor in both places
    (together,) = torch.autograd.grad(loss(model, tokens, targets), [embedding])
    torch.testing.assert_close(together, apart[0] + apart[1], rtol=1e-12, atol=1e-12)
    for part in apart:
        assert not torch.allclose(together, part)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@of_every_family
def test_dtypes_run_end_to_end(family: str, dtype: torch.dtype) -> None:
    """Against float64: nothing drops to a lower precision on the way, and every parameter has a gradient."""
    model, exact = filled(model_config(family), dtype), filled(model_config(family), F64)
    exact.load_state_dict(model.state_dict())
    tokens, targets = token_ids(2, LENGTH), token_ids(2, LENGTH, seed=1)
    actual, expected = loss(model, tokens, targets), loss(exact, tokens, targets).detach()
    # About a hundred roundings; one in float32 would leave 1e-8 in the first case, one in bfloat16 1e-3 in the second.
    bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert abs(float(actual.detach() / expected) - 1) <= bound
    actual.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == dtype, name
        assert parameter.grad.abs().max() > 0, name


def test_what_a_family_is_made_of() -> None:
    llama, gpt2 = filled(model_config(), F64), filled(model_config("gpt2"), F64)
    like = torch.empty((), dtype=F64)
    assert llama.sequences(1, 4, None, None, like).rotary is not None
    assert gpt2.sequences(1, 4, None, None, like).rotary is None
    assert not any(name.endswith("bias") for name, _ in llama.named_parameters())
    assert sum(name.endswith("bias") for name, _ in gpt2.named_parameters()) == 6 * 2 + 1


@pytest.mark.parametrize(
    ("activation", "plain"),
    [
        ("swiglu", F.silu),
        ("geglu", partial(F.gelu, approximate="tanh")),
        ("reglu", F.relu),
        ("gelu", partial(F.gelu, approximate="tanh")),
        ("gelu_erf", F.gelu),
    ],
)
def test_activation_of_the_feed_forward_block(activation: str, plain: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 8, dtype=torch.float64)
    own = activation_of(activation, KernelsConfig())(x)
    expected = plain(x) if activation.startswith("gelu") else plain(x[:, :4]) * x[:, 4:]
    torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


def test_attention_leaves_the_gradients_of_plain_autograd() -> None:
    """Queries and keys are rotated where they lie in the projection; the same without, by splits and the reference."""
    settings = model_config()
    model = filled(settings, F64)
    attention, x = model.layers["0"].attention, torch.randn(6, settings.hidden_size, dtype=F64, requires_grad=True)
    sequences = model.sequences(2, 3, torch.tensor([[4, 5, 6], [0, 1, 0]]), None, torch.empty((), dtype=F64))
    results = []
    for rotate in (rotary_projections, plain_projections):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transformer, "rotary_projections", rotate)
            out = attention(x, sequences)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, attention.qkv.weight])])
    for own, expected in zip(*results, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


def plain_projections(
    qkv: Tensor, shapes: list[tuple[int, ...]], cos: Tensor, sin: Tensor, **_: object
) -> tuple[Tensor, ...]:
    q, k, v = split_projections_reference(qkv, shapes)
    return *rotary_reference(q, k, cos, sin), v
