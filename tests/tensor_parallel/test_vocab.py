"""The loss over a sharded vocabulary against all logits in one process, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.topology import Layout
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.models.identity import ParameterSpec, assemble
from megatron_lite.models.transformer import LossHead
from megatron_lite.tensor_parallel.vocab import VocabParallelLossHead
from tests.models.tiny import model_config

TOKENS, HIDDEN, BOUND = 12, 6, 1e-13
SPEC = ParameterSpec("head.weight", (17, HIDDEN), shard_dim=0, is_vocabulary=True)
TARGETS = torch.tensor([[0, 16, 7, 8, -100, 3], [15, 16, -100, 1, 9, 12]])


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def head_job(is_sequence: bool, saves_gradients: bool) -> dict[str, Tensor]:
    size = torch.distributed.get_world_size()
    axis = build_mesh(Layout(tp=size), device=torch.device("cpu")).tp
    head = VocabParallelLossHead({"weight": SPEC}, axis, is_sequence).double().to_empty(device="cpu")
    head.saves_gradients = saves_gradients
    with torch.no_grad():
        head.weight.copy_(SPEC.take_shard(normal(1, *SPEC.shape), size, axis.index))
    whole = normal(2, TOKENS, HIDDEN)
    x = (whole.chunk(size)[axis.index] if is_sequence else whole).clone().requires_grad_()
    loss = head(x, TARGETS)
    (3.0 * loss).backward()
    assert x.grad is not None and head.weight.grad is not None
    return {"loss": loss.detach(), "x": x.grad, "weight": head.weight.grad, "logits": head.logits(x)}


def dense(weight: Tensor) -> dict[str, Tensor]:
    weight, x = weight.requires_grad_(), normal(2, TOKENS, HIDDEN).requires_grad_()
    logits = F.linear(x, weight)
    loss = F.cross_entropy(logits, TARGETS.flatten(), ignore_index=-100, reduction="sum")
    (3.0 * loss).backward()
    assert x.grad is not None and weight.grad is not None
    return {"loss": loss.detach(), "x": x.grad, "weight": weight.grad, "logits": logits.detach()}


@pytest.mark.parametrize("saves_gradients", [True, False])
@pytest.mark.parametrize("is_sequence", [False, True], ids=["whole tokens", "sequence parallel"])
@pytest.mark.parametrize("size", [2, 4])
def test_loss_and_gradients(pool: WorkerPool, size: int, is_sequence: bool, saves_gradients: bool) -> None:
    """On 4 ranks the last shard is empty and the third has one row; the rest of their rows pad."""
    expected = dense(normal(1, *SPEC.shape))
    results = pool.run(head_job, size, is_sequence, saves_gradients)
    for index, result in enumerate(results):
        torch.testing.assert_close(result["loss"], expected["loss"], rtol=BOUND, atol=0)
        assert torch.equal(result["loss"], results[0]["loss"])  # every rank has the very same loss
        torch.testing.assert_close(result["logits"], expected["logits"], rtol=BOUND, atol=BOUND)
        piece = SPEC.shard(size, index).pieces[0]
        assert not result["weight"][piece.size :].any()
        if not is_sequence:
            torch.testing.assert_close(result["x"], expected["x"], rtol=BOUND, atol=BOUND)
    weight = assemble(SPEC, [result["weight"] for result in results])
    torch.testing.assert_close(weight, expected["weight"], rtol=BOUND, atol=BOUND)
    if is_sequence:
        torch.testing.assert_close(torch.cat([r["x"] for r in results]), expected["x"], rtol=BOUND, atol=BOUND)
    if size == 4:
        assert SPEC.shard(4, 3).pieces[0].size == 0 and results[3]["weight"].shape == (8, HIDDEN)


def test_rows_that_count_by_mistake_would_be_noticed(pool: WorkerPool) -> None:
    """Negative control: with the padding rows (logits of 0) in the softmax, the loss is far off the bound."""
    padded = dense(F.pad(normal(1, *SPEC.shape), (0, 0, 0, 7)))
    loss = pool.run(head_job, 2, False, True)[0]["loss"]
    assert abs(padded["loss"] / loss - 1) > 1e6 * BOUND


def smoothed_job() -> list[Tensor]:
    """With label smoothing and z-loss: the loss of training, its gradient, and the loss of an evaluation."""
    size = torch.distributed.get_world_size()
    axis = build_mesh(Layout(tp=size), device=torch.device("cpu")).tp
    head = VocabParallelLossHead({"weight": SPEC}, axis, False).double().to_empty(device="cpu")
    head.label_smoothing, head.z_loss = 0.1, 1e-2
    with torch.no_grad():
        head.weight.copy_(SPEC.take_shard(normal(1, *SPEC.shape), size, axis.index))
    x = normal(2, TOKENS, HIDDEN).requires_grad_()
    loss = head(x, TARGETS)
    loss.backward()
    with torch.no_grad():
        evaluated = head(x, TARGETS)
    assert x.grad is not None
    return [loss.detach(), x.grad, evaluated]


def test_label_smoothing_and_z_loss_are_in_training_and_not_in_evaluation(pool: WorkerPool) -> None:
    """The whole head in one process does as the one in parts, and both as PyTorch's loss plus z times lse squared."""
    config = model_config(vocab_size=SPEC.shape[0], hidden_size=HIDDEN, num_heads=1, num_kv_heads=1)
    whole = LossHead(config).double()
    whole.label_smoothing, whole.z_loss = 0.1, 1e-2
    x = normal(2, TOKENS, HIDDEN).requires_grad_()
    with torch.no_grad():
        whole.weight.copy_(normal(1, *SPEC.shape))
        plain = whole(x, TARGETS)
    loss = whole(x, TARGETS)
    loss.backward()
    logits, targets = F.linear(x.detach(), whole.weight.detach()), TARGETS.flatten()
    sum_of = {"ignore_index": -100, "reduction": "sum"}
    squares = logits.logsumexp(dim=1).square()[targets != -100].sum()
    expected = F.cross_entropy(logits, targets, label_smoothing=0.1, **sum_of) + 1e-2 * squares
    torch.testing.assert_close(loss, expected, rtol=BOUND, atol=0)
    torch.testing.assert_close(plain, F.cross_entropy(logits, targets, **sum_of), rtol=BOUND, atol=0)
    for result in pool.run(smoothed_job, 2):
        for one, other in zip(result, (loss.detach(), x.grad, plain), strict=True):
            torch.testing.assert_close(one, other, rtol=BOUND, atol=BOUND)
