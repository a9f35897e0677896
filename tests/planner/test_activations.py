"""Activations: the formula against the storages that are alive between a forward and its backward, byte for byte."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite.config import RunConfig, load_config
from megatron_lite.config.problems import override
from megatron_lite.data.loader import Microbatch
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.ops import dispatch
from megatron_lite.ops.linear_cross_entropy import CHUNK_BYTES
from megatron_lite.pipeline.instructions import Instruction, Kind
from megatron_lite.pipeline.p2p import POSTED_AHEAD
from megatron_lite.planner import activations as formulas
from megatron_lite.planner import buffers
from megatron_lite.planner.activations import Activations, attention_kernel, peak_bytes
from megatron_lite.planner.in_flight import Held, held_by, held_over_time
from megatron_lite.planner.memory import predict
from megatron_lite.train.build import Training, build, layout_of
from tests.models.tiny import FAMILIES, token_ids
from tests.planner.alive import Alive
from tests.utils.meshes import mesh

LENGTH, GLOBAL_BATCH = 16, 8
SETTLING, SETTLING_S = 20, 0.01
LOSS_SUM = 8  # of each microbatch a float64 that the runner returns


def config_of(family: str, *keys: str, world_size: int = 1, micro_batch: int = 2) -> RunConfig:
    model = [override(f"model.{key}", value) for key, value in FAMILIES[family].items()]
    train = [f"train.seq_len={LENGTH}", f"train.global_batch_size={GLOBAL_BATCH}", "train.num_steps=1"]
    return load_config(None, [*model, *train, f"train.micro_batch_size={micro_batch}", *keys], world_size=world_size)


def microbatch(config: RunConfig) -> Microbatch:
    rows = config.train.micro_batch_size
    tokens = token_ids(rows, LENGTH + 1)
    isolated = config.data.isolate_documents
    documents = (torch.arange(LENGTH) // 5).int().repeat(rows, 1) if isolated else None
    positions = (torch.arange(LENGTH) % 5).repeat(rows, 1) if isolated else None
    return Microbatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), documents, positions)


def state_tensors(training: Training) -> list[Tensor]:
    return [tensor for bucket in training.engine.buckets.values() for tensor in (bucket.flat, bucket.sums)]


def batch_tensors(batch: Microbatch) -> list[Tensor]:
    return [tensor for tensor in vars(batch).values() if tensor is not None]


def measured(training: Training, chunk: int) -> int:
    """Alive after a forward of the chunk, when its output has left."""
    config, batch, dtype = training.config, microbatch(training.config), training.precision.compute
    with Alive() as alive:
        inputs = batch.tokens
        if chunk > 0:
            shape = Activations(config, "cpu").shard_tokens, config.model.hidden_size
            inputs = torch.randn(shape, dtype=dtype).requires_grad_()
        model, like = training.chunks[chunk], torch.empty((), dtype=dtype)
        sequences = model.sequences(*batch.tokens.shape, batch.positions, batch.documents, like)
        output = model(inputs, sequences, batch.targets)
    graph = torch.autograd.graph.get_gradient_edge(output)
    del output, sequences, like
    known, sizes = [*state_tensors(training), *batch_tensors(batch)], []
    for _ in range(SETTLING):  # a thread of gloo lets go of the tensor of the last collective a moment after it
        sizes.append(alive.num_bytes(without=known))
        time.sleep(SETTLING_S if training.mesh.tp.size > 1 else 0)
    assert graph is not None, "it holds what is counted"
    return min(sizes)


def predicted(training: Training, chunk: int) -> int:
    """Of one microbatch of the chunk, when nothing is in backward."""
    held = frozenset([Held(((chunk, 1),), (), 0, -1)])
    activations = Activations(training.config, "cpu")
    return peak_bytes(activations, training.schedule, training.chunk_layers, training.mesh.pp.index, held)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_one_process(family: str, precision: str, recompute: str) -> None:
    config = config_of(family, f"train.precision={precision}", f"parallel.recompute={recompute}")
    training = build(config, mesh=mesh())
    assert measured(training, 0) == predicted(training, 0) > 0


@pytest.mark.parametrize("family", ["mistral", "gpt2"])
@pytest.mark.parametrize("keys", [(), ("parallel.recompute=full", "parallel.recompute_layers=2")])
@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("isolate", ["false", "true"])
def test_documents_windows_and_batches(family: str, keys: tuple[str, ...], micro_batch: int, isolate: str) -> None:
    config = config_of(family, f"data.isolate_documents={isolate}", *keys, micro_batch=micro_batch)
    training = build(config, mesh=mesh())
    assert measured(training, 0) == predicted(training, 0) > 0


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage(stage: int, schedule: str) -> None:
    """With gpipe so many microbatches are in flight that the head keeps its inputs, and not its gradients."""
    config = config_of("llama", "parallel.pp=2", f"parallel.schedule={schedule}", world_size=2)
    training = build(config, mesh=mesh(pp=(2, stage)))
    assert measured(training, stage) == predicted(training, stage) > 0


def _on_tensor_ranks(config: RunConfig) -> tuple[int, int]:
    training = build(config, mesh=build_mesh(layout_of(config), device=torch.device("cpu")))
    return measured(training, 0), predicted(training, 0)


@pytest.mark.parametrize("sequence_parallel", ["false", "true"])
@pytest.mark.parametrize(("family", "recompute"), [("llama", "none"), ("gpt2", "selective"), ("llama", "full")])
def test_over_tensor_ranks(pool: WorkerPool, family: str, recompute: str, sequence_parallel: str) -> None:
    keys = (
        "parallel.tp=2", f"parallel.sequence_parallel={sequence_parallel}", f"parallel.recompute={recompute}",
        "train.precision=bf16",
    )  # fmt: skip
    for was, should in pool.run(_on_tensor_ranks, 2, config_of(family, *keys, world_size=2)):
        assert was == should > 0


class Samples:
    """In place of a recorder: what is alive when an instruction has ended."""

    def __init__(self, alive: Alive, known: list[Tensor]) -> None:
        self._alive, self._known, self._instruction = alive, known, Instruction(Kind.REDUCE_GRADIENTS)
        self.found: list[tuple[Instruction, int]] = []

    def begin(self, instruction: Instruction) -> None:
        self._instruction = instruction

    def end(self) -> None:
        if self._instruction.kind is Kind.REDUCE_GRADIENTS:
            return
        self.found.append((self._instruction, self._alive.num_bytes(without=self._known)))


@pytest.mark.parametrize("schedule", ["gpipe", "interleaved", "zb-h1"])
def test_a_step_of_a_schedule(schedule: str) -> None:
    """At the end of each forward and backward, and where the backward is split of each half of it."""
    training = build(config_of("llama", f"parallel.schedule={schedule}"), mesh=mesh())
    batches = [microbatch(training.config) for _ in range(training.schedule.num_microbatches)]
    known = [*state_tensors(training), *(tensor for batch in batches for tensor in batch_tensors(batch))]
    with Alive() as alive:
        samples: Any = Samples(alive, known)
        training.runner.recorder = samples
        training.runner.run(training.schedule, batches, torch.ones((), dtype=torch.float64))
    losses, most = 0, 0
    expected = held_over_time(training.schedule, 0, at_end=True)
    for (instruction, held), (sampled, num_bytes) in zip(expected, samples.found, strict=True):
        assert instruction == sampled
        losses += instruction.kind is Kind.FORWARD and instruction.chunk == len(training.chunk_layers) - 1
        num_bytes -= (losses + 1) * LOSS_SUM  # and the weight by which a loss sum enters the loss
        assert num_bytes == most_of(training, held), (instruction, held)
        most = max(most, num_bytes)
    kinds = {instruction.kind for instruction, _ in samples.found}
    assert (Kind.BACKWARD_WEIGHT in kinds) == (schedule == "zb-h1")
    assert most <= most_of(training, *held_by(training.schedule, 0)) == training_peak(training)


def most_of(training: Training, *held: Held) -> int:
    activations = Activations(training.config, "cpu")
    return peak_bytes(activations, training.schedule, training.chunk_layers, 0, frozenset(held))


def training_peak(training: Training) -> int:
    return predict(training.config, 0, "cpu").activations.device


def test_another_width_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: a formula that forgets a tensor of a layer is not equal."""
    training = build(config_of("llama"), mesh=mesh())
    right = Activations.layer.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(Activations, "layer", property(lambda self: right(self) - self.stream))
    assert measured(training, 0) != predicted(training, 0)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_constants_are_those_of_the_operations(family: str, precision: str) -> None:
    """They are written down once more in the planner, which does without torch."""
    training = build(config_of(family, f"train.precision={precision}"), mesh=mesh())
    chosen = dispatch.select("attention", "auto", training.precision.compute, "cpu").backend
    assert attention_kernel(training.config, "cpu") == chosen
    assert formulas.FEW_QUERIES == dispatch.FEW_QUERIES
    assert (buffers.LOGITS_CHUNK_BYTES, buffers.POSTED_AHEAD) == (CHUNK_BYTES, POSTED_AHEAD)
