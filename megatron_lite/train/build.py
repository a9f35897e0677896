"""From a configuration to a model that can take steps, in the order in which it happens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from megatron_lite.config.layout_rules import even_stages
from megatron_lite.config.schema import KernelsConfig, ModelConfig, RunConfig
from megatron_lite.distributed.mesh import Axis, Mesh
from megatron_lite.distributed.topology import Layout
from megatron_lite.models.families import parameter_table
from megatron_lite.models.identity import ParameterTable, WeightSource
from megatron_lite.models.initial import initial_shard
from megatron_lite.models.transformer import Transformer
from megatron_lite.optim.adamw import AdamW, AdamWState
from megatron_lite.optim.precision import PRECISIONS, Precision
from megatron_lite.pipeline.partition import cut_stage, layers_of_stage
from megatron_lite.pipeline.runner import PipelineRunner
from megatron_lite.pipeline.schedules import SCHEDULES, Schedule, forward_only
from megatron_lite.tensor_parallel.plan import apply_tensor_parallel
from megatron_lite.zero.engine import ZeroEngine

OPTIMIZERS = {"adamw": AdamW}


@dataclass
class Training:
    """A model on this rank's place in the mesh, ready to take steps.

    targets_axis: over which the target tokens of a global batch are counted. norm_axis: over which squared gradients
    are summed. num_steps: optimizer steps taken. before_update: called by each step when it is about to change master
    weights and moments.
    """

    config: RunConfig
    mesh: Mesh
    table: ParameterTable
    precision: Precision
    stage: Transformer
    engine: ZeroEngine
    optimizer: AdamW
    optimizer_states: dict[str, AdamWState]
    runner: PipelineRunner
    schedule: Schedule
    targets_axis: Axis
    norm_axis: Axis
    num_steps: int = 0
    before_update: Callable[[], None] = lambda: None

    def evaluation_schedule(self, num_microbatches: int) -> Schedule:
        return forward_only(self.mesh.pp.size, self.mesh.pp.index, num_microbatches)


def layout_of(config: RunConfig) -> Layout:
    parallel = config.parallel
    return Layout(pp=parallel.pp, dp=config.dp, cp=parallel.cp, tp=parallel.tp)


def build(config: RunConfig, *, mesh: Mesh, weights: WeightSource | None = None) -> Training:
    """Builds this rank's part of the run.

    weights: where the first values come from; by default they are drawn from ``config.train.seed``.
    """
    precision = PRECISIONS[config.train.precision]
    table = parameter_table(config.model)
    stage_layers = config.parallel.stage_layers or even_stages(config.model.num_layers, config.parallel.pp)

    model = build_stage(
        config.model,
        config.kernels,
        mesh=mesh,
        precision=precision,
        stage_layers=stage_layers,
        sequence_parallel=config.parallel.sequence_parallel,
        weights=weights or _drawn_from(config.train.seed, precision.master),
    )
    if model.head is not None:
        # GPipe holds every microbatch's graph at once: the gradients of the head would be held as often.
        model.head.saves_gradients = config.parallel.schedule != "gpipe"
        model.head.label_smoothing, model.head.z_loss = config.train.label_smoothing, config.train.z_loss

    engine = ZeroEngine(
        dict(model.named_parameters(remove_duplicate=False)),
        table,
        mesh=mesh,
        stage=config.parallel.zero_stage,
        param_dtype=precision.compute,
        grad_dtype=precision.master,
        sequence_parallel=config.parallel.sequence_parallel,
        stages_of={name: stage_of(name, stage_layers) for pair in table.tied_pairs() for name in pair},
    )
    optimizer = OPTIMIZERS[config.optim.name](config.optim, config.kernels.adamw)
    runner = PipelineRunner(
        model,
        mesh=mesh,
        dtype=precision.compute,
        tokens_divide_by=mesh.tp.size if config.parallel.sequence_parallel else 1,
        reduce_gradients=engine.reduce_gradients,
    )
    return Training(
        config=config,
        mesh=mesh,
        table=table,
        precision=precision,
        stage=model,
        engine=engine,
        optimizer=optimizer,
        optimizer_states={b.layout.name: optimizer.init_state(b.master) for b in engine.updated_buckets()},
        runner=runner,
        schedule=SCHEDULES[config.parallel.schedule](mesh.pp.size, mesh.pp.index, config.num_microbatches),
        targets_axis=mesh.dp,
        norm_axis=mesh.world,
    )


def build_stage(
    model: ModelConfig,
    kernels: KernelsConfig,
    *,
    mesh: Mesh,
    precision: Precision,
    stage_layers: Sequence[int],
    sequence_parallel: bool,
    weights: WeightSource,
) -> Transformer:
    """This rank's stage of the model, sliced over tp, with its weights on the device in the master dtype.

    stage_layers: number of layers of each pipeline stage. weights: gives this rank's shard of every parameter.
    """
    table = parameter_table(model)
    with torch.device("meta"):
        stage = Transformer(model, kernels)
    apply_tensor_parallel(stage, table, tp=mesh.tp, sequence_parallel=sequence_parallel)
    if stage.head is not None:
        stage.head.backend = kernels.cross_entropy
    cut_stage(stage, stage_layers, mesh.pp.index)
    _materialise(stage, table, mesh, precision, weights)
    return stage


def stage_of(name: str, stage_layers: tuple[int, ...]) -> int:
    """The pipeline stage that holds a parameter."""
    part = name.split(".")
    if part[0] == "embedding":
        return 0
    if part[0] != "layers":
        return len(stage_layers) - 1
    return next(s for s in range(len(stage_layers)) if int(part[1]) in layers_of_stage(stage_layers, s))


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
