"""Bytes of parameters, gradients and optimizer state: measured on built runs, they fall as the paper says, and are as
predicted."""

from __future__ import annotations

import dataclasses
import gc
import random
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_lite.config import ConfigError, RunConfig
from megatron_lite.data.loader import Microbatch
from megatron_lite.distributed.mesh import Mesh
from megatron_lite.distributed.topology import AXES
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.models.families import parameter_table
from megatron_lite.optim.precision import precision_of
from megatron_lite.planner.amounts import Amount
from megatron_lite.planner.memory import STATE, Plan, predict
from megatron_lite.train.build import Training, build, layout_of
from megatron_lite.train.checkpoints import blank_weights
from megatron_lite.train.memory import measured_state
from megatron_lite.train.step import train_step
from megatron_lite.zero.partition import lay_out, unit_of
from tests.models.tiny import token_ids
from tests.utils.meshes import axis, mesh
from tests.zero.test_engine import LENGTH, config_of, start

BF16 = ("train.precision=bf16", "train.grad_dtype=param")


def place_of(config: RunConfig, rank: int) -> Mesh:
    """A rank's place in the mesh of a run, without the other ranks: enough to build."""
    layout, group = layout_of(config), config.parallel.zero_group or config.dp
    made = mesh(**{name: (getattr(layout, name), layout.index(rank, name)) for name in AXES})
    shard = axis("shard", group, made.dp.index % group)
    replica = axis("replica", config.dp // group, made.dp.index // group)
    return dataclasses.replace(made, shard=shard, replica=replica)


def built(config: RunConfig, rank: int) -> Training:
    return build(config, mesh=place_of(config, rank), weights=blank_weights(precision_of(config.train).master))


def predicted(config: RunConfig, rank: int, device: str = "cpu") -> dict[str, Amount]:
    prediction = predict(config, rank, device)
    return {name: prediction.of(name) for name in STATE}


def padded_elements(config: RunConfig) -> int:
    """Of all parameters of a model that nothing but dp slices, as `lay_out` pads them."""
    units: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for spec in parameter_table(config.model):
        units.setdefault(unit_of(spec.name, ()), []).append((spec.name, spec.shape))
    return sum(lay_out(name, shapes, config.dp).size for name, shapes in units.items())


def after_a_step(config: RunConfig) -> dict[str, Amount]:
    training = start(config)
    tokens = token_ids(config.train.global_batch_size, LENGTH + 1, seed=0)
    own = tokens.tensor_split(training.mesh.dp.size)[training.mesh.dp.index]
    train_step(training, [Microbatch(row[None, :-1], row[None, 1:]) for row in own])
    return measured_state(training)


@pytest.mark.parametrize("dp", [2, 4, 8])
def test_table_1_of_the_paper(pool: WorkerPool, dp: int) -> None:
    """Rajbhandari et al. 2020: 2P + 2P + 12P bytes; stage 1 cuts the last by dp, 2 the second too, 3 all."""
    for stage, sliced in enumerate(
        [(), ("optimizer",), ("optimizer", "gradients"), ("optimizer", "gradients", "parameters")]
    ):
        config = config_of(
            *BF16,
            "train.global_batch_size=8",
            f"parallel.zero_stage={stage}",
            "parallel.reduce_policy=step",
            world_size=dp,
        )
        weights, padded = parameter_table(config.model).num_parameters, padded_elements(config)
        tensors = len(list(parameter_table(config.model)))
        assert weights <= padded < weights + 256 * tensors + 256 * dp * 4, "two layers, the embedding and the head"
        for measured in pool.run(after_a_step, dp, config):
            found = {
                "parameters": measured["parameters"].device,
                "gradients": measured["gradients"].device,
                "optimizer": measured["master"].device + measured["moments"].device,
            }
            for what, of_element in (("parameters", 2), ("gradients", 2), ("optimizer", 12)):
                assert found[what] * (dp if what in sliced else 1) == of_element * padded, (stage, what)


LAYOUTS = (
    (1, ()),
    (2, ()),
    (4, ("parallel.zero_group=2",)),
    (8, ("parallel.zero_group=4",)),
    (2, ("parallel.tp=2",)),
    (4, ("parallel.tp=2", "parallel.sequence_parallel=true")),
    (2, ("parallel.pp=2",)),
    (4, ("parallel.pp=2",)),
    (4, ("parallel.pp=2", "parallel.schedule=zb-v")),
    (8, ("parallel.pp=2", "parallel.tp=2")),
)
DTYPES = ("fp32", "bf16", "fp16", "fp64")
MORE_DTYPES = ((), ("train.grad_dtype=param",), ("train.stochastic_rounding=true",))
OPTIMIZERS = ("adamw", "adafactor", "sgd", "lion", "muon")
OFFLOADED = ((), ("optimizer",), ("gradients",), ("optimizer", "gradients"), ("optimizer", "gradients", "parameters"))
PLACES = ("cpu", "nvme")
NUM_SAMPLES = 60


def some_configs(folder: Path, seed: int) -> list[RunConfig]:
    """A spread over everything that says how large state is and where it lies; what the rules refuse is left out."""
    draw = random.Random(seed)
    sections = (
        *(LAYOUTS, range(4), DTYPES, MORE_DTYPES, OPTIMIZERS, OFFLOADED, PLACES),
        *(("step", "microbatch"), ("true", "false")),
    )
    choices = list(product(*sections))
    found = []
    while len(found) < NUM_SAMPLES:
        (world_size, keys), stage, dtype, more, optimizer, moved, place, policy, tied = draw.choice(choices)
        places = [f"offload.{what}={place}" for what in moved]
        places += [f"offload.dir={folder}"] if moved and place == "nvme" else []
        values = {
            "parallel.zero_stage": stage,
            "parallel.reduce_policy": policy,
            "train.precision": dtype,
            "optim.name": optimizer,
            "model.tie_embeddings": tied,
        }
        try:
            found.append(
                config_of(
                    *(f"{key}={value}" for key, value in values.items()),
                    *("model.num_layers=4", "train.global_batch_size=8", "optim.clip_grad_norm=1"),
                    *(*keys, *more, *places),
                    world_size=world_size,
                )
            )
        except ConfigError:
            continue
    return found


@pytest.mark.parametrize("seed", range(4))
def test_prediction_equals_allocation(tmp_path: Path, seed: int) -> None:
    draw, on_disk = random.Random(seed), 0
    for config in some_configs(tmp_path, seed):
        rank = draw.randrange(layout_of(config).world_size)
        training = built(config, rank)
        try:
            measured = measured_state(training)
            files = sum(path.stat().st_size for path in tmp_path.glob("*/*.offload"))
        finally:
            training.memory.close()
        expected = predicted(config, rank)
        said = f"rank {rank} of {config.parallel} {config.train} {config.optim.name} {config.offload}"
        assert measured == expected, said
        # Where slices differ, what is said of a stage is what its largest has.
        stage = Plan.of(config, "cpu").stage(training.mesh.pp.index)
        assert all(measured[name].device <= stage.of(name).device for name in STATE), said
        assert sum(amount.disk for amount in measured.values()) == files, said
        on_disk += bool(files)
    assert list(tmp_path.iterdir()) == [] and on_disk > NUM_SAMPLES // 10


def test_a_stage_is_as_large_as_its_largest_slice() -> None:
    """Muon keeps one moment of a matrix and two of what is none, so that slices differ."""
    config = config_of("optim.name=muon", "parallel.zero_stage=1", world_size=4)
    of_ranks = [measured_state(built(config, rank))["moments"].device for rank in range(4)]
    assert len(set(of_ranks)) > 1
    assert Plan.of(config, "cpu").stage(0).moments.device == max(of_ranks)


def test_seen_from_a_gpu_main_memory_is_host_memory() -> None:
    moved = [f"offload.{what}=cpu" for what in ("optimizer", "gradients", "parameters")]
    config = config_of("train.precision=bf16", "parallel.zero_stage=3", *moved, world_size=2)
    training = built(config, 1)
    assert all(amount.host == 0 < amount.device for amount in measured_state(training).values())
    training.mesh = dataclasses.replace(training.mesh, device=torch.device("cuda"))
    measured = measured_state(training)
    assert measured == predicted(config, 1, "cuda")
    assert all(amount.device == 0 < amount.host for amount in measured.values())


def live_bytes() -> int:
    """Of the storages of all tensors that there are in this process, each once (a sparse one, which other tests may
    have left, has none)."""
    gc.collect()
    storages = {}
    for one in gc.get_objects():
        if isinstance(one, Tensor) and one.device.type == "cpu" and one.layout == torch.strided:
            storages[one.untyped_storage()._cdata] = one.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("tied", ["true", "false"])
def test_everything_is_counted_once(stage: int, tied: str) -> None:
    """There are no tensors but those that are measured: what measures cannot have forgotten any."""
    before = live_bytes()
    config = config_of(
        "train.precision=bf16", f"parallel.zero_stage={stage}", f"model.tie_embeddings={tied}", world_size=2
    )
    training = built(config, 1)
    measured = sum(amount.device for amount in measured_state(training).values())
    assert live_bytes() - before == measured > 0
    # Negative control: one tensor more.
    more = torch.zeros(1000)
    assert live_bytes() - before == measured + more.nbytes
