"""The runner on two stages against the whole model in one process: every bit is the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.topology import Layout
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.pipeline.p2p import Inbox, Outbox
from megatron_lite.pipeline.partition import cut_stage
from megatron_lite.pipeline.runner import PipelineRunner
from megatron_lite.pipeline.schedules import SCHEDULES, Instruction, Kind, forward_only
from tests.models.tiny import filled, model_config, token_ids
from tests.utils.meshes import mesh as lone_mesh

CONFIG = model_config(num_layers=3)
SPLIT, NUM_MICROBATCHES = (1, 2), 5
WEIGHT = torch.tensor(0.37, dtype=torch.float64)
F32, CPU = torch.float32, torch.device("cpu")


@dataclass(frozen=True)
class Batch:
    tokens: Tensor
    targets: Tensor
    documents: Tensor | None
    positions: Tensor | None


def batches() -> list[Batch]:
    documents = torch.tensor([[0] * 3 + [1] * 5] * 2)
    positions = torch.tensor([[*range(3), *range(5)]] * 2)
    return [
        Batch(token_ids(2, 8, seed=m), token_ids(2, 8, seed=100 + m), documents, positions)
        for m in range(NUM_MICROBATCHES)
    ]


def in_one_process() -> tuple[list[Tensor], dict[str, Tensor]]:
    """A plain loop: no schedule, no runner."""
    model, losses = filled(CONFIG, F32), []
    for batch in batches():
        batch_size, seq_len = batch.tokens.shape
        like = torch.empty((), dtype=F32)
        sequences = model.sequences(batch_size, seq_len, batch.positions, batch.documents, like)
        loss = model(batch.tokens, sequences, batch.targets)
        loss.backward(WEIGHT)
        losses.append(loss.detach())
    return losses, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def run_stage(schedule: str) -> dict[str, Any]:
    mesh = build_mesh(Layout(pp=2), device=CPU)
    stage = filled(CONFIG, F32)
    cut_stage(stage, SPLIT, mesh.pp.index)
    reductions: list[int] = []

    def reduce_gradients() -> None:
        reductions.append(sum(parameter.grad is not None for parameter in stage.parameters()))

    runner = PipelineRunner(stage, mesh=mesh, dtype=F32, tokens_divide_by=1, reduce_gradients=reduce_gradients)
    with torch.no_grad():  # an evaluation between steps leaves no trace
        plan = forward_only(2, mesh.pp.index, NUM_MICROBATCHES)
        evaluated = runner.run(plan, batches(), WEIGHT)
    assert all(parameter.grad is None for parameter in stage.parameters())
    losses = runner.run(SCHEDULES[schedule](2, mesh.pp.index, NUM_MICROBATCHES), batches(), WEIGHT)
    return {
        "losses": losses,
        "evaluated": evaluated,
        "gradients": {name: parameter.grad for name, parameter in stage.named_parameters()},
        "reductions": reductions,
    }


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_stages_equal_one_process(pool: WorkerPool, schedule: str) -> None:
    losses, gradients = in_one_process()
    results = pool.run(run_stage, 2, schedule)
    assert results[0]["losses"] == results[0]["evaluated"] == []
    for found in (results[1]["losses"], results[1]["evaluated"]):
        assert len(found) == NUM_MICROBATCHES
        assert all(torch.equal(one, other) for one, other in zip(found, losses, strict=True))
    found = {**results[0]["gradients"], **results[1]["gradients"]}
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0 and torch.equal(found[name], gradient), name
    for result in results:  # once, and when every gradient was there
        assert result["reductions"] == [len(result["gradients"])]


def test_microbatches_in_another_order_give_other_bits() -> None:
    """Negative control: why the order of backwards is part of the contract."""
    gradients = in_one_process()[1]
    model = filled(CONFIG, F32)
    runner = PipelineRunner(model, mesh=lone_mesh(), dtype=F32, tokens_divide_by=1, reduce_gradients=lambda: None)
    runner.run(SCHEDULES["gpipe"](1, 0, NUM_MICROBATCHES), list(reversed(batches())), WEIGHT)
    differing = [n for n, p in model.named_parameters() if p.grad is None or not torch.equal(p.grad, gradients[n])]
    assert differing


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_stage_alone_equals_a_plain_loop(schedule: str) -> None:
    losses, gradients = in_one_process()
    model = filled(CONFIG, F32)
    runner = PipelineRunner(model, mesh=lone_mesh(), dtype=F32, tokens_divide_by=1, reduce_gradients=lambda: None)
    found = runner.run(SCHEDULES[schedule](1, 0, NUM_MICROBATCHES), batches(), WEIGHT)
    assert all(torch.equal(one, other) for one, other in zip(found, losses, strict=True))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.equal(parameter.grad, gradients[name]), name


def test_a_schedule_that_leaves_tensors_behind_is_noticed() -> None:
    runner = PipelineRunner(
        filled(CONFIG, F32), mesh=lone_mesh(), dtype=F32, tokens_divide_by=1, reduce_gradients=lambda: None
    )
    plan = [Instruction(Kind.FORWARD, 0), Instruction(Kind.FORWARD, 1), Instruction(Kind.BACKWARD, 0)]
    with pytest.raises(AssertionError):
        runner.run(plan, batches(), WEIGHT)


def exchange() -> list[list[float]]:
    """Stage 0 sends three tensors, which stage 1 takes in order."""
    pp = build_mesh(Layout(pp=2), device=CPU).pp
    if pp.is_first:
        outbox = Outbox(pp, 1)
        for microbatch in range(3):
            outbox.send(torch.full((2, 2), float(microbatch)).t(), microbatch)
        outbox.flush()
        return []
    inbox = Inbox(pp, 0, range(3), (2, 2), F32, CPU)
    taken = [inbox.take(0)]
    with pytest.raises(AssertionError, match="2 is not next"):
        inbox.take(2)
    taken += [inbox.take(1), inbox.take(2)]
    with pytest.raises(AssertionError):
        inbox.take(3)
    return [tensor.flatten().tolist() for tensor in taken]


def test_an_inbox_hands_out_in_order_only(pool: WorkerPool) -> None:
    assert pool.run(exchange, 2)[1] == [[float(microbatch)] * 4 for microbatch in range(3)]
