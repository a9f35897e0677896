"""The optimizer's part of a step: from gradients that are complete to parameters that are whole."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_lite.config.schema import RunConfig
from megatron_lite.distributed.mesh import Mesh
from megatron_lite.models.identity import ParameterTable
from megatron_lite.optim.adafactor import Adafactor
from megatron_lite.optim.adamw import AdamW
from megatron_lite.optim.lion import Lion
from megatron_lite.optim.muon import Muon
from megatron_lite.optim.optimizer import Axes, Optimizer, OptimizerState, Parameter, Region
from megatron_lite.optim.sgd import SGD
from megatron_lite.train.offload import StateMemory
from megatron_lite.train.rounding import weights_to_update
from megatron_lite.zero.bucket import Bucket
from megatron_lite.zero.engine import ZeroEngine

if TYPE_CHECKING:  # it builds the optimizer by what is here
    from megatron_lite.train.build import Training

_MOMENTS = frozenset({"first", "second"})
_UPDATED = _MOMENTS | {"values", "master"}  # gradients are only read

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adamw": AdamW,
    "adafactor": Adafactor,
    "sgd": SGD,
    "lion": Lion,
    "muon": Muon,
}


def make_optimizer(config: RunConfig, mesh: Mesh) -> Optimizer:
    """The optimizer of a run, which may communicate over the ranks that share slices, and over tp."""
    return OPTIMIZERS[config.optim.name](config.optim, Axes(mesh.shard, mesh.tp, mesh.device), config.kernels.adamw)


def region_of(bucket: Bucket, table: ParameterTable) -> Region:
    """What an optimizer is told of the elements of a bucket that this rank updates."""
    specs = {spec.name: spec for spec in table}
    return Region(
        parameters=tuple(Parameter(specs[slot.name], slot.shape, slot.start) for slot in bucket.layout.slots),
        start=bucket.region.start,
        stop=bucket.region.stop,
        size=bucket.layout.size,
        num_slices=bucket.memory.num_shards,
        undecayed=tuple((run.start, run.stop) for run, decays in bucket.decay_runs() if not decays),
    )


def init_states(
    engine: ZeroEngine, optimizer: Optimizer, table: ParameterTable, memory: StateMemory, dtype: torch.dtype
) -> dict[str, OptimizerState]:
    """What the optimizer keeps of each updated bucket, by its name, in the memory that the config names for it."""
    return {
        bucket.layout.name: optimizer.init_state(
            region_of(bucket, table), dtype, engine.mesh.device, partial(memory.keep_moments, bucket.layout.name, dtype)
        )
        for bucket in engine.updated_buckets()
    }


def update(training: Training, lr: float, factor: float) -> None:
    """Changes this rank's weights by its gradients times the factor, and makes the parameters whole again.

    The gradients stay as they are: the optimizer multiplies as it reads them. A step that is to be skipped never comes
    here, and the optimizer does not count it. What is offloaded of a bucket is read while the one before is computed
    on, and written while the next one is.
    """
    engine = training.engine
    training.before_update()
    order = [bucket.layout.name for bucket in engine.updated_buckets()]
    weights = {bucket.weights_kind for bucket in engine.updated_buckets()}
    for name, tensors in training.stream.walk(order, reads=_MOMENTS | weights | {"sums"}, writes=_UPDATED):
        _update_bucket(training, engine.buckets[name], tensors, lr, factor)
        engine.start_gather(engine.buckets[name])
    engine.gather_parameters()


def _update_bucket(training: Training, bucket: Bucket, tensors: Mapping[str, Tensor], lr: float, factor: float) -> None:
    """tensors: the bucket's, by kind, and its moments. It is computed where the moments are, and what lies elsewhere
    goes there and back."""
    state = training.optimizer_states[bucket.layout.name]
    own, values = tensors[bucket.weights_kind], tensors["values"]
    home = next((tensors[kind].device for kind in state.tensors if tensors[kind].numel()), own.device)
    master = own.to(home)
    rounded = None
    if values is not own:
        rounded = values if values.device == home else torch.empty_like(values, device=home)
    stored, state.tensors = state.tensors, {kind: tensors[kind] for kind in state.tensors}
    try:
        with weights_to_update(training, bucket, master) as weights:
            training.optimizer.step(weights, tensors["sums"].to(home), state, lr, factor=factor, parameters=rounded)
    finally:
        state.tensors = stored
    if master is not own:
        own.copy_(master)
    if rounded is not None and rounded is not values:
        values.copy_(rounded)
