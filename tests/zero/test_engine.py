"""The engine over real axes: what a step computes does not depend on how the state is sliced."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite.config import RunConfig, load_config
from megatron_lite.data.loader import Microbatch
from megatron_lite.distributed import collectives
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.models.families import parameter_table
from megatron_lite.models.identity import assemble
from megatron_lite.pipeline.instructions import Kind
from megatron_lite.pipeline.prove import prove
from megatron_lite.train.build import Training, build, layout_of
from megatron_lite.train.step import apply_gradients, compute_gradients, gradient_norm
from tests.models.tiny import some_values, token_ids

NUM_STEPS, BATCH, LENGTH = 3, 4, 8
KEYS = (
    "model.family=llama",
    "model.vocab_size=97",
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.ffn_hidden_size=48",
    "model.max_seq_len=16",
    f"train.seq_len={LENGTH}",
    f"train.global_batch_size={BATCH}",
    f"train.num_steps={NUM_STEPS}",
    "optim.lr=0.01",
    "optim.weight_decay=0.5",
    "optim.clip_grad_norm=0.5",
    # Where a gradient is zero but for rounding (a key bias), a small eps would make it a step of size lr.
    "optim.eps=1e-4",
)


def config_of(*keys: str, world_size: int) -> RunConfig:
    return load_config(None, [*KEYS, *keys], world_size=world_size)


def start(config: RunConfig) -> Training:
    mesh = build_mesh(layout_of(config), device=torch.device("cpu"), zero_group=config.parallel.zero_group)
    return build(config, mesh=mesh, weights=lambda spec, tp, index: spec.take_shard(some_values(spec), tp, index))


def batches(training: Training, step: int) -> list[Microbatch]:
    tokens = token_ids(training.config.train.global_batch_size, LENGTH + 1, seed=step)
    own = tokens.tensor_split(training.mesh.dp.size)[training.mesh.dp.index]
    return [Microbatch(row[None, :-1], row[None, 1:]) for row in own]


def padding_of(training: Training) -> list[Tensor]:
    """Everything in the buckets that is no parameter's element, and the vocabulary rows that only pad."""
    parts = []
    for bucket in training.engine.buckets.values():
        is_used = torch.zeros(bucket.layout.size, dtype=torch.bool)
        for slot in bucket.layout.slots:
            spec = training.table[slot.name]
            used = is_used[slot.interval.start : slot.interval.stop].view(slot.shape)
            for piece in spec.shard(training.mesh.tp.size, training.mesh.tp.index).pieces:
                used.narrow(spec.shard_dim or 0, piece.local, piece.size).fill_(True)
        parts += [bucket.flat[~is_used]] if training.engine.stage < 3 else []
        region = slice(bucket.region.start, bucket.region.stop)
        parts += [bucket.sums[~is_used[region]], bucket.values[~is_used[region]]]
        if bucket.shared_with is None:
            state = training.optimizer_states[bucket.layout.name]
            parts.append(bucket.master[~is_used[region]])
            for kind in state.tensors:
                for start, held in state.parts(kind, region.start, region.stop):
                    parts.append(held[~is_used[start : start + held.numel()]])
    return parts


def parameters_in_use(training: Training) -> dict[str, Tensor]:
    """What the model computes with, whole."""
    engine, parameters = training.engine, {}
    for bucket in engine.buckets.values():
        flat = collectives.all_gather(bucket.values, training.mesh.shard) if engine.stage == 3 else bucket.flat
        for slot in bucket.layout.slots:
            parameters[slot.name] = flat[slot.interval.start : slot.interval.stop].view(slot.shape).clone()
    return parameters


def train(config: RunConfig, change: Callable[[Training], None] = lambda training: None) -> dict[str, Any]:
    """change: of what was built."""
    training = start(config)
    change(training)
    engine, norms = training.engine, []
    names = [name for name, _ in training.named_parameters()]
    gradients = {}
    for step in range(NUM_STEPS):
        compute_gradients(training, batches(training, step))
        if step == 0:
            gradients = {name: engine.whole_gradient(name) for name in names}
        norms.append(apply_gradients(training)[0])
    padding = padding_of(training)
    state = sum(s.tensors["first"].numel() for s in training.optimizer_states.values())
    shares = {name: bucket.shared_with is not None for name, bucket in engine.buckets.items()}
    return {
        "parameters": {name: engine.whole_master(name) for name in names},
        "used": parameters_in_use(training),
        "gradients": gradients,
        "norms": norms,
        "padding": sum(part.numel() for part in padding),
        "dirty padding": sum(int(part.count_nonzero()) for part in padding),
        "state": state,
        "shares": shares,
    }


def same_bits(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one["norms"] == other["norms"] and all(
        one[what].keys() == other[what].keys()
        and all(torch.equal(value, other[what][name]) for name, value in one[what].items())
        for what in ("parameters", "used", "gradients")
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zero_stages_agree_in_every_bit(pool: WorkerPool, precision: str) -> None:
    """Over two microbatches a rank, with nothing named but the stage."""
    runs = []
    for stage in range(4):
        config = config_of(f"parallel.zero_stage={stage}", f"train.precision={precision}", world_size=2)
        first, second = pool.run(train, 2, config)
        assert same_bits(first, second), "data-parallel ranks hold the same"
        assert first["dirty padding"] == second["dirty padding"] == 0 < first["padding"]
        runs.append(first)
    whole, *sliced = runs
    assert [same_bits(one, whole) for one in sliced] == [True] * 3
    assert [one["state"] * 2 for one in sliced] == [whole["state"]] * 3
    # Negative controls: the order of the microbatches' additions is noticed, and one bit of one weight.
    # The few bits of gradients in bf16 add up without rounding in fp32, in any order.
    keys = ("parallel.zero_stage=2", "parallel.reduce_policy=microbatch", f"train.precision={precision}")
    reordered, _ = pool.run(train, 2, config_of(*keys, world_size=2))
    assert precision == "bf16" or not same_bits(reordered, whole)
    whole["parameters"]["head.weight"][3, 3].nextafter_(torch.tensor(9.0))
    assert not any(same_bits(one, whole) for one in sliced)


def test_parameters_in_use_are_the_master_weights_rounded(pool: WorkerPool) -> None:
    config = config_of("train.precision=bf16", world_size=2)
    for result in pool.run(train, 2, config):
        for name, master in result["parameters"].items():
            assert master.dtype == torch.float32 and result["used"][name].dtype == torch.bfloat16
            assert torch.equal(result["used"][name], master.to(torch.bfloat16)), name
        weight = result["parameters"]["layers.0.mlp.up.weight"]
        assert not torch.equal(weight, weight.to(torch.bfloat16).float()), "the masters keep more than bf16"


def never_start_a_sum(training: Training) -> None:
    schedule = training.schedule
    lists = [tuple(one for one in own if one.kind is not Kind.START_REDUCTION) for own in schedule.lists]
    training.schedule = replace(schedule, lists=tuple(lists))
    assert training.schedule != schedule
    prove(training.schedule, dp=2)


def never_sum(training: Training) -> None:
    never_start_a_sum(training)
    training.engine._start_sum = lambda bucket, key: None  # type: ignore[method-assign]


@pytest.mark.parametrize("reduce", ["step", "microbatch"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_sums_that_no_instruction_starts_are_made_at_the_end(pool: WorkerPool, stage: int, reduce: str) -> None:
    """In the same order. Four microbatches a rank: of two, either order gives the same bits."""
    keys = (f"parallel.zero_stage={stage}", f"parallel.reduce_policy={reduce}", "train.global_batch_size=8")
    config = config_of(*keys, world_size=2)
    plain, late = pool.run(train, 2, config), pool.run(train, 2, config, never_start_a_sum)
    assert same_bits(plain[0], late[0]) and same_bits(plain[1], late[1])
    assert not same_bits(plain[0], pool.run(train, 2, config, never_sum)[0])  # negative control


def whole(results: list[dict[str, Any]], config: RunConfig, what: str) -> dict[str, Tensor]:
    """Global tensors from the tensor-parallel ranks' shards; they come stage by stage."""
    tensors = {}
    for spec in parameter_table(config.model):
        holders = [result[what][spec.name] for result in results if spec.name in result[what]]
        tensors[spec.name] = assemble(spec, holders)
    return tensors


LAYOUTS = {
    "kv heads shared by ranks": ("model.num_kv_heads=1", "parallel.tp=2"),
    "sequence parallel": ("parallel.tp=2", "parallel.sequence_parallel=true"),
    "tied on one stage": ("model.tie_embeddings=true", "parallel.tp=2"),
    "tied over two stages": ("model.tie_embeddings=true", "parallel.pp=2"),
    "gpt2": ("model.family=gpt2", "model.num_kv_heads=4", "parallel.tp=2", "parallel.sequence_parallel=true"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_and_norms_are_those_of_one_process(pool: WorkerPool, layout: str) -> None:
    """In float64, after the sums over tp, over both uses of a tied table, and with each element counted once.

    1e-12: some hundred roundings of 1e-16, on sums that nearly cancel.
    """
    keys = LAYOUTS[layout]
    model_keys = [key for key in keys if key.startswith("model.")]
    config = config_of(*keys, "train.precision=fp64", world_size=2)
    results = pool.run(train, 2, config)
    (single,) = pool.run(train, 1, config_of(*model_keys, "train.precision=fp64", world_size=1))
    assert all(result["dirty padding"] == 0 for result in results)
    for what in ("gradients", "parameters"):
        expected = single[what]
        for name, value in whole(results, config, what).items():
            scale = expected[name].abs().max()
            assert scale > 0 and (value - expected[name]).abs().max() <= 1e-12 * scale, (what, name)
    for result in results:
        assert result["norms"] == pytest.approx(single["norms"], rel=1e-12)
    if "tied" in layout:
        assert single["shares"]["head.weight"] and torch.equal(
            single["gradients"]["head.weight"], single["gradients"]["embedding.tokens.weight"]
        )
        assert any(result["shares"].get("head.weight", False) for result in results) == ("one stage" in layout)


def norm_of_one_process(keys: list[str]) -> tuple[float, float]:
    """Ours, and torch's over the gradients by name, a tied pair once."""
    training = start(config_of(*keys, "train.precision=fp64", world_size=1))
    compute_gradients(training, batches(training, 0))
    tied = {follower for _, follower in training.table.tied_pairs()}
    gradients = [training.engine.whole_gradient(spec.name) for spec in training.table if spec.name not in tied]
    return gradient_norm(training), float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients])))


@pytest.mark.parametrize("keys", [[], ["model.tie_embeddings=true"]], ids=["untied", "tied"])
def test_the_norm_is_that_of_all_gradients(pool: WorkerPool, keys: list[str]) -> None:
    ((ours, torchs),) = pool.run(norm_of_one_process, 1, keys)
    assert ours == pytest.approx(torchs, rel=1e-15) and ours > 0


def forget_to_zero() -> tuple[Tensor, Tensor]:
    """A second step's gradients, with and without those of the first."""
    config = config_of("train.precision=fp64", world_size=1)
    training = start(config)
    compute_gradients(training, batches(training, 0))
    first = training.engine.whole_gradient("head.weight")
    compute_gradients(training, batches(training, 0))
    return first, training.engine.whole_gradient("head.weight")


def test_gradients_of_a_step_begin_at_zero(pool: WorkerPool) -> None:
    ((first, second),) = pool.run(forget_to_zero, 1)
    assert torch.equal(first, second) and first.any()


def clip_hard(precision: str) -> dict[str, Any]:
    """Of one step: gradients before and after it, and the moments that it left, with and without clipping."""
    found: dict[str, Any] = {}
    for name, largest in (("clipped", 1e-3), ("whole", 0.0)):
        config = config_of(f"optim.clip_grad_norm={largest}", f"train.precision={precision}", world_size=1)
        training = start(config)
        compute_gradients(training, batches(training, 0))
        before = training.engine.whole_gradient("head.weight")
        norm, _ = apply_gradients(training)
        moment = training.optimizer_states["head"].tensors["first"].clone()
        found[name] = before, training.engine.whole_gradient("head.weight"), moment, norm
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_clipping_is_in_the_update_and_leaves_the_gradients(pool: WorkerPool, precision: str) -> None:
    (found,) = pool.run(clip_hard, 1, precision)
    for before, after, _, _ in found.values():
        assert torch.equal(before, after) and before.any()
    (_, _, clipped, norm), (_, _, whole, _) = found["clipped"], found["whole"]
    factor = 1e-3 / (norm + 1e-6)
    assert factor < 0.01
    torch.testing.assert_close(clipped, whole * factor, rtol=1e-6, atol=0)


def unknown_name() -> str:
    training = start(config_of(world_size=1))
    with pytest.raises(KeyError) as caught:
        training.engine.whole_gradient("layers.9.mlp.up.weight")
    return str(caught.value)


def test_a_parameter_that_is_elsewhere_is_named(pool: WorkerPool) -> None:
    assert "layers.9.mlp.up.weight is not on this pipeline stage" in pool.run(unknown_name, 1)[0]


def lifetimes(stage: int) -> list[bool]:
    """After a step, and after the run is let go of: whether the engine and its buckets are gone."""
    training = start(config_of(f"parallel.zero_stage={stage}", world_size=1))
    compute_gradients(training, batches(training, 0))
    left = [weakref.ref(training.engine), *map(weakref.ref, training.engine.buckets.values())]
    assert all(one() is not None for one in left)
    del training
    gc.collect()
    return [one() is None for one in left]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_engine_that_is_let_go_of_is_gone(pool: WorkerPool, stage: int) -> None:
    """With its memory and its process groups: hooks on tensors are references that Python's collector does not see."""
    (gone,) = pool.run(lifetimes, 1, stage)
    assert all(gone), gone
