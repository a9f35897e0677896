"""From a configuration to a model that can take steps, in the order in which it happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from megatron_lite.config.batch_rampup import with_batch_size
from megatron_lite.config.schema import KernelsConfig, ModelConfig, RunConfig
from megatron_lite.distributed.mesh import Axis, Mesh
from megatron_lite.distributed.topology import Layout
from megatron_lite.models.families import parameter_table
from megatron_lite.models.identity import ParameterTable, WeightSource
from megatron_lite.models.initial import initial_shard
from megatron_lite.models.recompute import Recompute
from megatron_lite.models.transformer import Transformer
from megatron_lite.ops.linear import WeightGradients, defer_weight_gradients
from megatron_lite.optim.loss_scale import LossScale
from megatron_lite.optim.optimizer import Optimizer, OptimizerState
from megatron_lite.optim.precision import Precision, precision_of
from megatron_lite.pipeline.instructions import Kind, Schedule
from megatron_lite.pipeline.partition import chunk_layers_of, chunk_of, cut_chunk, layers_of_chunk
from megatron_lite.pipeline.runner import PipelineRunner
from megatron_lite.pipeline.schedules import most_in_flight, schedule_of
from megatron_lite.pipeline.zero_steps import ZeroSteps
from megatron_lite.tensor_parallel.plan import apply_tensor_parallel
from megatron_lite.train.offload import StateMemory
from megatron_lite.train.update import init_states, make_optimizer
from megatron_lite.zero.engine import ZeroEngine
from megatron_lite.zero.offload import BucketStream


@dataclass
class Training:
    """A model on this rank's place in the mesh, ready to take steps.

    chunks: the parts of the model on this rank, by their number along its depth; one unless a rank has virtual stages.
    chunk_layers: number of layers of each chunk of the whole model.
    targets_axis: over which the target tokens of a global batch are counted. norm_axis: over which squared gradients
    are summed. loss_scaler: with fp16 alone. num_steps: steps taken, also those that were skipped. before_update:
    called by each step when it is about to change master weights and moments.
    """

    config: RunConfig
    mesh: Mesh
    table: ParameterTable
    precision: Precision
    chunks: dict[int, Transformer]
    chunk_layers: tuple[int, ...]
    engine: ZeroEngine
    optimizer: Optimizer
    optimizer_states: dict[str, OptimizerState]
    memory: StateMemory
    stream: BucketStream
    runner: PipelineRunner
    schedule: Schedule
    targets_axis: Axis
    norm_axis: Axis
    loss_scaler: LossScale | None = None
    num_steps: int = 0
    before_update: Callable[[], None] = lambda: None

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of all chunks, by their names in the whole model."""
        for chunk in self.chunks.values():
            yield from chunk.named_parameters()

    def set_batch_size(self, batch_size: int) -> None:
        """Gives the next steps the schedule of global batches of this size, at most ``train.global_batch_size``."""
        wanted = with_batch_size(self.config, batch_size)
        if wanted.num_microbatches != self.schedule.num_microbatches:
            self.schedule = schedule_of(wanted)


def layout_of(config: RunConfig) -> Layout:
    parallel = config.parallel
    return Layout(pp=parallel.pp, dp=config.dp, cp=parallel.cp, tp=parallel.tp)


def build(config: RunConfig, *, mesh: Mesh, weights: WeightSource | None = None) -> Training:
    """Builds this rank's part of the run.

    weights: where the first values come from; by default they are drawn from ``config.train.seed``.
    """
    precision = precision_of(config.train)
    table = parameter_table(config.model)
    # That of a full batch: where smaller ones split backwards, it does.
    schedule = schedule_of(config)
    chunk_layers = chunk_layers_of(config.model, config.parallel, config.train.seq_len, schedule.placement)
    weights = weights or _drawn_from(config.train.seed, precision.master)
    chunks = {
        chunk: _outline(
            config.model,
            config.kernels,
            mesh=mesh,
            chunk_layers=chunk_layers,
            chunk=chunk,
            sequence_parallel=config.parallel.sequence_parallel,
        )
        for chunk in schedule.placement.chunks_of(mesh.pp.index)
    }
    memory = StateMemory(config, mesh)
    engine = ZeroEngine(
        {chunk: {name: tuple(p.shape) for name, p in model.named_parameters()} for chunk, model in chunks.items()},
        table,
        mesh=mesh,
        stage=config.parallel.zero_stage,
        param_dtype=precision.compute,
        grad_dtype=precision.gradients,
        master_dtype=precision.master,
        sequence_parallel=config.parallel.sequence_parallel,
        stages_of={
            name: schedule.placement.rank_of[chunk_of(name, chunk_layers)]
            for pair in table.tied_pairs()
            for name in pair
        },
        weights=lambda name: weights(table[name], mesh.tp.size, mesh.tp.index),
        reduces_each_microbatch=config.parallel.reduce_policy == "microbatch" and not config.parallel.weight_stashing,
        keep=memory.keep,
    )
    splits_backward = any(one.kind is Kind.BACKWARD_WEIGHT for one in schedule.lists[mesh.pp.index])
    weight_gradients = {chunk: WeightGradients() for chunk in chunks} if splits_backward else {}
    for chunk, model in chunks.items():
        engine.attach(chunk, model)
        _configure(model, config, schedule, chunk)
        defer_weight_gradients(model, weight_gradients.get(chunk))
    optimizer = make_optimizer(config, mesh)
    runner = PipelineRunner(
        chunks,
        schedule.placement,
        mesh=mesh,
        dtype=precision.compute,
        tokens_divide_by=mesh.tp.size if config.parallel.sequence_parallel else 1,
        reduce_gradients=(lambda: None) if config.parallel.weight_stashing else engine.finish_gradients,
        weight_gradients=weight_gradients,
        memory=engine,
        zero=ZeroSteps.of(config),
    )
    states = init_states(engine, optimizer, table, memory, precision.moments)
    return Training(
        config=config,
        mesh=mesh,
        table=table,
        precision=precision,
        chunks=chunks,
        chunk_layers=chunk_layers,
        engine=engine,
        optimizer=optimizer,
        optimizer_states=states,
        memory=memory,
        stream=memory.stream({bucket.layout.name: bucket.stored for bucket in engine.updated_buckets()}),
        runner=runner,
        schedule=schedule,
        targets_axis=mesh.dp,
        norm_axis=mesh.world,
        loss_scaler=LossScale.first(config.loss_scale) if config.train.precision == "fp16" else None,
    )


def build_chunk(
    model: ModelConfig,
    kernels: KernelsConfig,
    *,
    mesh: Mesh,
    precision: Precision,
    chunk_layers: Sequence[int],
    chunk: int,
    sequence_parallel: bool,
    weights: WeightSource,
) -> Transformer:
    """A chunk of the model, sliced over tp, with its weights on the device in the master dtype.

    chunk_layers: number of layers of each chunk. weights: gives this rank's shard of every parameter.
    """
    part = _outline(
        model, kernels, mesh=mesh, chunk_layers=chunk_layers, chunk=chunk, sequence_parallel=sequence_parallel
    )
    _materialise(part, parameter_table(model), mesh, precision, weights)
    return part


def _outline(
    model: ModelConfig,
    kernels: KernelsConfig,
    *,
    mesh: Mesh,
    chunk_layers: Sequence[int],
    chunk: int,
    sequence_parallel: bool,
) -> Transformer:
    """A chunk of the model, sliced over tp, with its parameters on the meta device."""
    table = parameter_table(model)
    with torch.device("meta"):
        part = Transformer(model, kernels)
    apply_tensor_parallel(part, table, tp=mesh.tp, sequence_parallel=sequence_parallel)
    if part.head is not None:
        part.head.backend = kernels.cross_entropy
    cut_chunk(part, layers_of_chunk(chunk_layers, chunk), chunk, len(chunk_layers))
    return part


def _configure(model: Transformer, config: RunConfig, schedule: Schedule, chunk: int) -> None:
    """What training sets on a chunk besides its weights."""
    parallel, rank = config.parallel, schedule.placement.rank_of[chunk]
    model.recompute = Recompute(parallel.recompute_of(rank), parallel.recompute_layers)
    if model.embedding is not None:
        model.embedding.gradient_scale = config.train.embedding_gradient_scale
    if model.head is not None:
        # Where many microbatches are between forward and backward, the gradients of the head would be held as often.
        model.head.saves_gradients = most_in_flight(schedule, chunk) <= 2
        model.head.label_smoothing, model.head.z_loss = config.train.label_smoothing, config.train.z_loss


def _drawn_from(seed: int, dtype: torch.dtype) -> WeightSource:
    return lambda spec, tp, index: initial_shard(spec, seed, tp, index, dtype)


def _materialise(
    model: Transformer, table: ParameterTable, mesh: Mesh, precision: Precision, weights: WeightSource
) -> None:
    """Replaces the parameters on the meta device by real ones in the master dtype."""
    for name, parameter in list(model.named_parameters()):
        spec = table[name]
        value = weights(spec, mesh.tp.size, mesh.tp.index).to(device=mesh.device, dtype=precision.master)
        assert value.shape == parameter.shape, f"{name}: {tuple(value.shape)} is not {tuple(parameter.shape)}"
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value))
