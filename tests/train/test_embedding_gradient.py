"""`train.embedding_gradient_scale` in every layout: the token table's gradient is scaled, and no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite.config import RunConfig, load_config
from megatron_lite.data.loader import Microbatch
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.models.families import parameter_table
from megatron_lite.models.identity import assemble
from megatron_lite.train.build import build, layout_of
from megatron_lite.train.step import compute_gradients
from tests.models.tiny import filled, some_values, token_ids

BATCH, LENGTH, TABLE, HEAD = 4, 8, "embedding.tokens.weight", "head.weight"
KEYS = (
    "model.family=gpt2", "model.vocab_size=97", "model.hidden_size=32", "model.num_layers=2", "model.num_heads=4",
    "model.max_seq_len=16", f"train.seq_len={LENGTH}", f"train.global_batch_size={BATCH}", "train.num_steps=1",
)  # fmt: skip
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one process": (1, ()),
    "tp 2": (2, ("parallel.tp=2",)),
    "sequence parallel": (2, ("parallel.tp=2", "parallel.sequence_parallel=true")),
    "pp 2": (2, ("parallel.pp=2", "parallel.recompute=full")),
    "zb-h1": (2, ("parallel.pp=2", "parallel.schedule=zb-h1")),
    "tp 2, pp 2, dp 2": (8, ("parallel.tp=2", "parallel.pp=2")),
}


def config_of(*keys: str, world_size: int = 1) -> RunConfig:
    return load_config(None, [*KEYS, *keys], world_size=world_size)


def gradients(config: RunConfig) -> dict[str, Tensor]:
    """Of one batch, this rank's shards, whole over dp."""
    mesh = build_mesh(layout_of(config), device=torch.device("cpu"))
    training = build(config, mesh=mesh, weights=lambda spec, tp, index: spec.take_shard(some_values(spec), tp, index))
    own = token_ids(BATCH, LENGTH + 1).tensor_split(mesh.dp.size)[mesh.dp.index]
    compute_gradients(training, [Microbatch(row[None, :-1], row[None, 1:]) for row in own])
    return {name: training.engine.whole_gradient(name) for name, _ in training.named_parameters()}


def run(pool: WorkerPool, *keys: str, world_size: int = 1) -> dict[str, Tensor]:
    """Global gradients, from the shards of all ranks."""
    config = config_of(*keys, world_size=world_size)
    results: list[dict[str, Any]] = pool.run(gradients, world_size, config)
    one_replica = results if config.dp == 1 else [results[rank] for rank in (0, 1, 4, 5)]  # of pp 2 x dp 2 x tp 2
    return {
        spec.name: assemble(spec, [result[spec.name] for result in one_replica if spec.name in result])
        for spec in parameter_table(config.model)
    }


def oracle(config: RunConfig) -> dict[str, Tensor]:
    """Unsharded, in float64, by autograd alone. A tied table has two parameters here, one for each use."""
    model, tokens = filled(config.model, torch.float64), token_ids(BATCH, LENGTH + 1)
    sequences = model.sequences(BATCH, LENGTH, None, None, torch.empty((), dtype=torch.float64))
    model(tokens[:, :-1], sequences, tokens[:, 1:]).backward()
    return {name: one.grad / (BATCH * LENGTH) for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_input_use_alone_is_scaled(pool: WorkerPool, layout: str, tied: bool) -> None:
    """1e-12: some hundred roundings of 1e-16, on sums that nearly cancel."""
    world_size, keys = LAYOUTS[layout]
    model = f"model.tie_embeddings={str(tied).lower()}"
    scale = "train.embedding_gradient_scale=0.1"
    found = run(pool, model, "train.precision=fp64", scale, *keys, world_size=world_size)
    expected = oracle(config_of(model))
    by_use = expected[TABLE], expected[HEAD]
    expected[TABLE] = 0.1 * by_use[0]
    if tied:
        expected[TABLE] = expected[HEAD] = 0.1 * by_use[0] + by_use[1]
    for name, gradient in found.items():
        size = expected[name].abs().max()
        assert size > 0 and (gradient - expected[name]).abs().max() <= 1e-12 * size, name
    # Negative controls: not scaled, or the head's use scaled as well, would be seen.
    wrong = (by_use[0] + by_use[1], 0.1 * (by_use[0] + by_use[1])) if tied else (by_use[0],)
    for gradient in wrong:
        assert (found[TABLE] - gradient).abs().max() > 1e-3 * gradient.abs().max()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("keys", [(), ("parallel.tp=2",), ("parallel.pp=2",)], ids=["single", "tp 2", "pp 2"])
def test_a_power_of_two_is_exact_and_changes_no_other_bit(
    pool: WorkerPool, keys: tuple[str, ...], precision: str
) -> None:
    run_keys = ("model.tie_embeddings=false", f"train.precision={precision}", *keys)
    world_size = 2 if keys else 1
    plain = run(pool, *run_keys, world_size=world_size)
    scaled = run(pool, *run_keys, "train.embedding_gradient_scale=0.125", world_size=world_size)
    for name, gradient in plain.items():
        assert torch.equal(scaled[name], (0.125 if name == TABLE else 1.0) * gradient) and gradient.any(), name
