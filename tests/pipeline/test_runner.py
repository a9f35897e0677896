"""The runner on several ranks against the whole model in one process: every bit is the same."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_lite.config.schedules import SCHEDULE_RULES
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.topology import Layout
from megatron_lite.distributed.worker_pool import WorkerError, WorkerPool
from megatron_lite.models.transformer import Transformer
from megatron_lite.ops.linear import WeightGradients, defer_weight_gradients
from megatron_lite.pipeline.instructions import Instruction, Kind, Placement, Schedule, loop
from megatron_lite.pipeline.p2p import Mail
from megatron_lite.pipeline.partition import cut_chunk, layers_of_chunk
from megatron_lite.pipeline.runner import PipelineRunner
from megatron_lite.pipeline.schedules import SCHEDULES, make_schedule
from tests.models.tiny import filled, model_config, token_ids
from tests.utils.meshes import mesh as lone_mesh

CONFIG = model_config(num_layers=5)
NUM_MICROBATCHES = 5
WEIGHT = torch.tensor(0.37, dtype=torch.float64)
F32, CPU = torch.float32, torch.device("cpu")
SPLITS = {1: (5,), 2: (1, 4), 4: (1, 1, 2, 1)}


@dataclass(frozen=True)
class Batch:
    tokens: Tensor
    targets: Tensor
    documents: Tensor | None
    positions: Tensor | None


def batches(count: int = NUM_MICROBATCHES) -> list[Batch]:
    documents = torch.tensor([[0] * 3 + [1] * 5] * 2)
    positions = torch.tensor([[*range(3), *range(5)]] * 2)
    return [Batch(token_ids(2, 8, seed=m), token_ids(2, 8, seed=100 + m), documents, positions) for m in range(count)]


def in_one_process(dtype: torch.dtype = F32) -> tuple[list[Tensor], dict[str, Tensor]]:
    """A plain loop: no schedule, no runner."""
    model, losses = filled(CONFIG, dtype), []
    for batch in batches():
        batch_size, seq_len = batch.tokens.shape
        like = torch.empty((), dtype=dtype)
        sequences = model.sequences(batch_size, seq_len, batch.positions, batch.documents, like)
        loss = model(batch.tokens, sequences, batch.targets)
        loss.backward(WEIGHT)
        losses.append(loss.detach())
    return losses, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def cut(placement: Placement, rank: int) -> dict[int, Transformer]:
    chunks = {}
    for chunk in placement.chunks_of(rank):
        chunks[chunk] = filled(CONFIG, F32)
        split = SPLITS[placement.num_chunks]
        cut_chunk(chunks[chunk], layers_of_chunk(split, chunk), chunk, len(split))
    return chunks


def run_rank(name: str, pp: int, virtual_stages: int) -> dict[str, Any]:
    mesh = build_mesh(Layout(pp=pp), device=CPU) if pp > 1 else lone_mesh()
    schedule = make_schedule(name, pp, virtual_stages, NUM_MICROBATCHES)
    chunks = cut(schedule.placement, mesh.pp.index)
    stores = {chunk: WeightGradients() for chunk in chunks}
    for chunk, model in chunks.items():
        defer_weight_gradients(model, stores[chunk])
    reductions: list[int] = []

    def parameters() -> dict[str, torch.nn.Parameter]:
        return {name: parameter for model in chunks.values() for name, parameter in model.named_parameters()}

    runner = PipelineRunner(
        chunks,
        schedule.placement,
        mesh=mesh,
        dtype=F32,
        tokens_divide_by=1,
        reduce_gradients=lambda: reductions.append(sum(p.grad is not None for p in parameters().values())),
        weight_gradients=stores,
    )
    evaluated = runner.evaluate(batches())  # it leaves no trace
    assert all(parameter.grad is None for parameter in parameters().values())
    losses = runner.run(schedule, batches(), WEIGHT)
    return {
        "holds_last": schedule.placement.num_chunks - 1 in chunks,
        "losses": losses,
        "evaluated": evaluated,
        "gradients": {name: parameter.grad for name, parameter in parameters().items()},
        "reductions": reductions,
    }


def cases() -> list[tuple[str, int, int]]:
    """Every schedule on one rank and on two, with each number of chunks that it takes and the model has layers for."""
    found: list[tuple[str, int, int]] = []
    for name, rule in SCHEDULE_RULES.items():
        found += [(name, pp, chunks) for pp in (1, 2) for chunks in (1, 2) if rule.takes(chunks)]
    return found


@pytest.mark.parametrize(("name", "pp", "virtual_stages"), cases())
def test_every_schedule_equals_a_plain_loop(pool: WorkerPool, name: str, pp: int, virtual_stages: int) -> None:
    losses, gradients = in_one_process()
    results = pool.run(run_rank, pp, name, pp, virtual_stages) if pp > 1 else [run_rank(name, 1, virtual_stages)]
    found: dict[str, Tensor] = {}
    for result in results:
        assert not found.keys() & result["gradients"].keys()
        found |= result["gradients"]
        for values in (result["losses"], result["evaluated"]):
            assert len(values) == (NUM_MICROBATCHES if result["holds_last"] else 0)
            assert all(torch.equal(one, other) for one, other in zip(values, losses, strict=False))
        # once, and when every gradient was there
        assert result["reductions"] == [len(result["gradients"])]
    assert found.keys() == gradients.keys()
    for parameter, gradient in gradients.items():
        assert gradient.abs().max() > 0 and torch.equal(found[parameter], gradient), parameter


def test_every_schedule_is_a_case() -> None:
    assert {name for name, _, _ in cases()} == SCHEDULES.keys()
    assert {pp for _, pp, _ in cases()} == {1, 2}


def lone_runner(model: Transformer) -> PipelineRunner:
    return PipelineRunner(
        {0: model}, loop(1), mesh=lone_mesh(), dtype=F32, tokens_divide_by=1, reduce_gradients=lambda: None
    )


def test_microbatches_in_another_order_give_other_bits() -> None:
    """Negative control: why the order of backwards is part of the contract."""
    gradients = in_one_process()[1]
    model = filled(CONFIG, F32)
    schedule = make_schedule("gpipe", 1, 1, NUM_MICROBATCHES)
    lone_runner(model).run(schedule, list(reversed(batches())), WEIGHT)
    differing = [n for n, p in model.named_parameters() if p.grad is None or not torch.equal(p.grad, gradients[n])]
    assert differing


def test_a_schedule_that_leaves_tensors_behind_is_noticed() -> None:
    kinds = ((Kind.FORWARD, 0), (Kind.FORWARD, 1), (Kind.BACKWARD, 0))
    plan = Schedule("unfinished", loop(1), 2, ([Instruction(kind, 0, m) for kind, m in kinds],))
    with pytest.raises(AssertionError, match=r"left tensors behind: \[\(0, 1\)\]"):
        lone_runner(filled(CONFIG, F32)).run(plan, batches(2), WEIGHT)


def test_outputs_are_free_once_they_are_sent(pool: WorkerPool) -> None:
    """Of GPipe's five microbatches the first rank holds graphs, and no output."""
    held, of_outputs = pool.run(held_outputs, 2)[0]
    assert held == 0 and of_outputs > 0


def held_outputs() -> tuple[int, int]:
    """Elements of outputs still alive when the first backward begins, and what they would be, on the first rank."""
    mesh = build_mesh(Layout(pp=2), device=CPU)
    schedule = make_schedule("gpipe", 2, 1, NUM_MICROBATCHES)
    chunks = cut(schedule.placement, mesh.pp.index)
    made: list[Any] = []
    seen: list[int] = []

    def alive() -> int:
        return sum(size for reference, size in made if not reference.expired())

    def watch(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
        if mesh.pp.is_first:
            made.append((StorageWeakRef(output.untyped_storage()), output.numel()))
            assert output.grad_fn is not None
            output.grad_fn.register_prehook(lambda gradients: seen.append(alive()))

    for model in chunks.values():
        model.register_forward_hook(watch)
    runner = PipelineRunner(
        chunks, schedule.placement, mesh=mesh, dtype=F32, tokens_divide_by=1, reduce_gradients=lambda: None
    )
    runner.run(schedule, batches(), WEIGHT)
    return (seen[0] if seen else 0), sum(size for _, size in made)


def exchange() -> list[list[float]]:
    """The first rank sends three tensors, which the second one takes in another order."""
    mesh = build_mesh(Layout(pp=2), device=CPU)
    sends = [Instruction(Kind.SEND_ACTIVATION, 0, m) for m in range(3)]
    receives = [Instruction(Kind.RECEIVE_ACTIVATION, 1, m) for m in range(3)]
    mail = Mail(receives if mesh.pp.is_last else sends, loop(2), 3, mesh=mesh, shape=(2, 2), dtype=F32)
    if mesh.pp.is_first:
        mail.exchange([], [(send, torch.full((2, 2), float(send.microbatch)).t()) for send in sends])
        mail.flush()
        return []
    mail.exchange(receives, [])
    used_by = Instruction(Kind.FORWARD, 1, 0)
    taken = [mail.take(receives[m], used_by).flatten().tolist() for m in (1, 0, 2)]
    mail.flush()
    return taken


def test_messages_arrive_by_name(pool: WorkerPool) -> None:
    assert pool.run(exchange, 2)[1] == [[1.0] * 4, [0.0] * 4, [2.0] * 4]


def lose_the_second_rank() -> None:
    mesh = build_mesh(Layout(pp=2), device=CPU)
    schedule = make_schedule("1f1b", 2, 1, NUM_MICROBATCHES)
    chunks = cut(schedule.placement, mesh.pp.index)
    runner = PipelineRunner(
        chunks, schedule.placement, mesh=mesh, dtype=F32, tokens_divide_by=1, reduce_gradients=lambda: None
    )
    if mesh.pp.is_last:
        chunks[1].register_forward_hook(lambda *_: os._exit(3))
    runner.run(schedule, batches(), WEIGHT)


def test_a_rank_that_dies_is_missed_by_name(pool: WorkerPool) -> None:
    with pytest.raises(WorkerError) as caught:
        pool.run(lose_the_second_rank, 2)
    waited = r"pipeline rank 0 waited in backward of chunk 0, microbatch 0 to receive gradient of chunk 0, microbatch 0"
    assert f"{waited} from pipeline rank 1" in str(caught.value)
