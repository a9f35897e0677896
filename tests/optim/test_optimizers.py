"""Every optimizer on every way to slice a model, against plain ones over whole tensors in float64.

Gradients are given, and not computed, so that what a layout changes is the optimizer's doing alone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_lite.config import RunConfig, load_config
from megatron_lite.distributed import collectives
from megatron_lite.distributed.mesh import Axis, build_mesh
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.models.families import parameter_table
from megatron_lite.models.identity import ParameterSpec, assemble, same_bits
from megatron_lite.optim import muon_exchange, optimizer
from megatron_lite.optim.state_sizes import state_elements
from megatron_lite.train.build import Training, build, layout_of
from megatron_lite.train.update import update
from megatron_lite.utils.random import standard_normal
from tests.optim.plain_optimizers import run_plain

RATES = (1e-2, 3e-2, 2e-2, 1e-2)
FACTOR = 0.25  # a power of two: the product is exact in any dtype
# Parts of fused projections, and slices, begin and end in the middle of rows and of blocks of 256 elements.
KEYS = (
    "model.family=llama", "model.vocab_size=37", "model.hidden_size=24", "model.num_layers=2", "model.num_heads=4",
    "model.num_kv_heads=2", "model.ffn_hidden_size=36", "model.max_seq_len=8", "train.seq_len=8",
    "train.global_batch_size=4", "train.num_steps=8", "optim.weight_decay=0.3",
)  # fmt: skip
OPTIMIZERS = {
    "adamw": ("optim.name=adamw",),
    "adafactor": ("optim.name=adafactor",),
    "adafactor, constant decay": ("optim.name=adafactor", "optim.dynamic_weight_decay=false"),
    "sgd": ("optim.name=sgd",),
    "sgd, nesterov": ("optim.name=sgd", "optim.nesterov=true"),
    "sgd, no momentum": ("optim.name=sgd", "optim.momentum=0"),
    "lion": ("optim.name=lion",),
    "muon": ("optim.name=muon",),
    "muon, plain momentum": ("optim.name=muon", "optim.nesterov=false"),
}
LAYOUTS = {
    "one process": ("parallel.dp=1",),
    "dp 2, ZeRO 0": ("parallel.dp=2", "parallel.zero_stage=0"),
    "dp 2, ZeRO 1": ("parallel.dp=2", "parallel.zero_stage=1"),
    "tp 2": ("parallel.dp=1", "parallel.tp=2"),
    "tp 2, dp 2": ("parallel.dp=2", "parallel.tp=2", "parallel.zero_stage=1"),
}
MODELS = {
    "llama": (),
    "a kv head on two ranks": ("model.num_kv_heads=1",),
    "gpt2, tied": ("model.family=gpt2", "model.num_kv_heads=4"),
}


def config_of(*keys: str) -> RunConfig:
    sizes = [int(key.partition("=")[2]) for key in keys if key.startswith(("parallel.dp", "parallel.tp"))]
    return load_config(None, [*KEYS, *keys], world_size=sizes[0] * (sizes[1] if len(sizes) > 1 else 1))


def weights_of(spec: ParameterSpec) -> Tensor:
    """Norms near 1, biases of 0, as a run begins: Adafactor's least scale has something to do.

    Rows grow, so that no part of a matrix is as large as another.
    """
    name = spec.tied_to or spec.name
    noise = 0.1 * torch.from_numpy(standard_normal(7, name, 0, spec.numel)).view(spec.shape)
    rows = torch.linspace(0.5, 3, spec.shape[0], dtype=torch.float64).view(-1, *[1] * (len(spec.shape) - 1))
    return noise + 1 if spec.init == "ones" else noise * rows * (spec.init == "normal")


def gradient_of(spec: ParameterSpec, step: int) -> Tensor:
    """Of a size that the parameter's name says; here and there zero."""
    name = spec.tied_to or spec.name
    noise = torch.from_numpy(standard_normal(8, f"{name} {step}", 0, spec.numel)).view(spec.shape)
    return noise * (noise > -1.5) * 10.0 ** (1 - len(name) % 3)


@dataclass(frozen=True)
class Result:
    """What a rank has: its weights, whole over dp, and the parameters in use; its state, allocated and predicted."""

    tp_index: int
    weights: dict[str, Tensor]
    used: dict[str, Tensor]
    allocated: dict[str, dict[str, int]]
    predicted: dict[str, dict[str, int]]


def job(config: RunConfig, forgets: str = "", block: int = 1 << 16) -> Result:
    mesh = build_mesh(layout_of(config), device=torch.device("cpu"))
    training = build(config, mesh=mesh, weights=lambda spec, tp, index: spec.take_shard(weights_of(spec), tp, index))
    with mock.patch.object(optimizer, "_BLOCK", block):
        for step, lr in enumerate(RATES):
            give_gradients(training, step)
            with forgetting(forgets):
                update(training, lr, FACTOR)
    regions = {b.layout.name: b for b in training.engine.updated_buckets()}
    states = training.optimizer_states
    assert all(state.num_steps == len(RATES) for state in states.values())
    return Result(
        mesh.tp.index,
        {name: training.engine.whole_master(name) for name, _ in training.named_parameters()},
        {name: parameter.detach().clone() for name, parameter in training.named_parameters()},
        {name: {kind: tensor.numel() for kind, tensor in states[name].tensors.items()} for name in regions},
        {
            name: state_elements(config.optim, b.layout.slots, b.region.start, b.region.stop)
            for name, b in regions.items()
        },
    )


def give_gradients(training: Training, step: int) -> None:
    tp = training.mesh.tp
    for bucket in training.engine.updated_buckets():
        for slot in bucket.layout.slots:
            spec = training.table[slot.name]
            shard = spec.take_shard(gradient_of(spec, step), tp.size, tp.index)
            here = slot.interval.intersect(bucket.region)
            own = here.shift(-bucket.region.start)
            if own.size:
                bucket.sums[own.start : own.stop] = shard.flatten()[here.start - slot.start : here.stop - slot.start]


@contextlib.contextmanager
def forgetting(axis_name: str) -> Iterator[None]:
    """Optimizers that tell the other ranks of an axis nothing, and take what these have for zero."""
    reduce, exchange = collectives.all_reduce, muon_exchange.exchange

    def reduce_less(tensor: Tensor, axis: Axis) -> Tensor:
        return tensor if axis.name == axis_name else reduce(tensor, axis)

    def exchange_less(outgoing: Any, places: Any, axis: Axis, device: torch.device) -> None:
        if axis.name != axis_name:
            exchange(outgoing, places, axis, device)
            return
        for index, tensors in enumerate(places):
            for number, place in enumerate(tensors):
                place.copy_(outgoing[index][number].reshape(place.shape) if index == axis.index else torch.zeros(()))

    with (
        mock.patch.object(collectives, "all_reduce", reduce_less),
        mock.patch.object(muon_exchange, "exchange", exchange_less),
    ):
        yield


def run(pool: WorkerPool, *keys: str, **more: Any) -> list[Result]:
    config = config_of(*keys)
    return pool.run(functools.partial(job, **more), config.world_size, config, threads=1)


def whole(results: list[Result], config: RunConfig) -> dict[str, Tensor]:
    """Global weights from those of all ranks; replicas have to agree in every bit."""
    tensors = {}
    for spec in parameter_table(config.model):
        by_tp: dict[int, Tensor] = {}
        for result in results:
            shard = result.weights[spec.name]
            assert same_bits(by_tp.setdefault(result.tp_index, shard), shard), spec.name
        tensors[spec.name] = assemble(spec, [by_tp[index] for index in sorted(by_tp)])
    return tensors


def expected(config: RunConfig, **more: Any) -> dict[str, Tensor]:
    table = parameter_table(config.model)
    weights = {spec.name: weights_of(spec) for spec in table}
    gradients = [{spec.name: FACTOR * gradient_of(spec, step) for spec in table} for step in range(len(RATES))]
    return run_plain(config.optim, table, weights, gradients, RATES, **more)


def largest_difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Of each parameter, relative to how far the largest of its weights has moved or is."""
    return {
        name: float((found[name].double() - value).abs().max() / value.abs().max().clamp(min=1e-3))
        for name, value in wanted.items()
    }


@pytest.mark.parametrize("layout", ["one process", "dp 2, ZeRO 1", "tp 2, dp 2"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_weights_are_those_of_a_plain_optimizer(pool: WorkerPool, name: str, layout: str) -> None:
    """1e-12: some roundings of 1e-16 a step; Muon's iterations let those of a small singular value grow 500 times."""
    keys = (*OPTIMIZERS[name], *LAYOUTS[layout], "train.precision=fp64")
    found, wanted = whole(run(pool, *keys), config_of(*keys)), expected(config_of(*keys))
    differences = largest_difference(found, wanted)
    assert max(differences.values()) < 1e-12, differences
    moved = largest_difference(found, {spec.name: weights_of(spec) for spec in parameter_table(config_of(*keys).model)})
    assert min(moved.values()) > 1e-3, "nothing has moved"


@pytest.mark.parametrize("model", list(MODELS)[1:])
@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_other_models_do_as_well(pool: WorkerPool, name: str, model: str) -> None:
    keys = (*OPTIMIZERS[name], *MODELS[model], *LAYOUTS["tp 2, dp 2"], "train.precision=fp64")
    differences = largest_difference(whole(run(pool, *keys), config_of(*keys)), expected(config_of(*keys)))
    assert max(differences.values()) < 1e-12, differences


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_slices_change_no_bit(pool: WorkerPool, name: str, precision: str) -> None:
    """Nor does tp: what a matrix is scaled by, and what it is orthogonalized to, is made of all of it in one order.

    Adafactor's scale is summed over other blocks with another tp, so that its last bit may be another one.
    """
    results, layouts = {}, dict(LAYOUTS)
    if name.startswith("adafactor"):
        layouts = {layout: keys for layout, keys in LAYOUTS.items() if "tp 2" not in layout}
    for layout, keys in layouts.items():
        keys = (*OPTIMIZERS[name], *keys, f"train.precision={precision}")
        found = run(pool, *keys)
        results[layout] = whole(found, config_of(*keys))
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        for result in found:
            assert all(same_bits(result.used[key], value.to(dtype)) for key, value in result.weights.items())
    one = results.pop("one process")
    for layout, other in results.items():
        assert [key for key in one if not same_bits(one[key], other[key])] == [], layout


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_blocks_change_no_bit(pool: WorkerPool, name: str) -> None:
    small, large = (run(pool, *OPTIMIZERS[name], *LAYOUTS["one process"], block=block)[0] for block in (256, 1 << 16))
    assert [key for key, value in small.weights.items() if not same_bits(value, large.weights[key])] == []


FORGOTTEN = {
    "Adafactor's sum over tp": ("adafactor", "tp 2", "tp"),
    "Adafactor's sum over slices": ("adafactor", "dp 2, ZeRO 1", "shard"),
    "Muon's gathering over tp": ("muon", "tp 2", "tp"),
    "Muon's gathering over slices": ("muon", "dp 2, ZeRO 1", "shard"),
}


@pytest.mark.parametrize("case", FORGOTTEN)
def test_what_ranks_do_not_tell_each_other_shows(pool: WorkerPool, case: str) -> None:
    """Negative control."""
    name, layout, axis_name = FORGOTTEN[case]
    keys = (*OPTIMIZERS[name], *LAYOUTS[layout], "train.precision=fp64")
    differences = largest_difference(run(pool, *keys, forgets=axis_name)[0].weights, first_shards(config_of(*keys)))
    assert sum(value > 1e-3 for value in differences.values()) >= 2, differences


def first_shards(config: RunConfig) -> dict[str, Tensor]:
    table, tp = parameter_table(config.model), config.parallel.tp
    return {name: table[name].take_shard(value, tp, 0) for name, value in expected(config).items()}


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_what_is_fused_is_taken_apart(name: str) -> None:
    """Negative control: the oracle knows the difference."""
    config = config_of(*OPTIMIZERS[name], *LAYOUTS["one process"])
    differences = largest_difference(expected(config, fused=True), expected(config))
    assert {key for key, value in differences.items() if value > 1e-3} == {
        f"layers.{layer}.{part}.weight" for layer in range(2) for part in ("attention.qkv", "mlp.up")
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_as_large_as_predicted(pool: WorkerPool, name: str) -> None:
    keys = (*OPTIMIZERS[name], "train.precision=bf16")
    (one,) = run(pool, *keys, *LAYOUTS["one process"])
    halves = run(pool, *keys, *LAYOUTS["dp 2, ZeRO 1"])
    for result in (one, *halves):
        assert result.allocated == result.predicted
    for bucket, kinds in one.allocated.items():
        for kind, elements in kinds.items():
            parts = [half.allocated[bucket][kind] for half in halves]
            assert elements <= sum(parts) < elements + 512, "but for padding to two slices, 256 elements each"
    wanted = {"lion": {"first"}, "sgd": {"first"}, "sgd, nesterov": {"first"}, "sgd, no momentum": set()}
    assert set(one.allocated["embedding"]) == wanted.get(name, {"first", "second"})
    if name == "muon":
        norms = 2 * 256  # of 24 weights, each to the next multiple of 256
        assert one.allocated["layers.0"]["second"] == norms < one.allocated["layers.0"]["first"]
