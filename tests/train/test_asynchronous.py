"""PipeDream's asynchronous updates, against a single process that plays them with explicit versions of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite.config import ConfigError, RunConfig
from megatron_lite.config.load import load_config
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.pipeline.instructions import Instruction, Kind
from megatron_lite.pipeline.partition import chunk_of
from megatron_lite.pipeline.schedules import schedule_of
from megatron_lite.train.asynchronous import AsynchronousUpdates
from megatron_lite.train.build import Training, build, layout_of
from megatron_lite.train.step import train_step
from megatron_lite.verify.trial import perturbed_weights, proof_batch
from tests.utils.meshes import mesh as lone_mesh

NUM_MICROBATCHES, NUM_STEPS = 6, 2
KEYS = (
    "model.family=llama", "model.vocab_size=61", "model.hidden_size=32", "model.num_layers=4", "model.num_heads=4",
    "model.num_kv_heads=2", "model.ffn_hidden_size=48", "model.max_seq_len=16", "train.seq_len=16",
    f"train.global_batch_size={NUM_MICROBATCHES}", "train.num_steps=100", "train.precision=fp64",
    "optim.schedule=constant", "optim.lr=0.01", "optim.weight_decay=0", "optim.clip_grad_norm=0", "optim.eps=1e-4",
)  # fmt: skip
STASHING = "parallel.weight_stashing=true"


def config(*keys: str, world_size: int = 1) -> RunConfig:
    return load_config(None, [*KEYS, *keys], world_size=world_size)


def built(config: RunConfig) -> Training:
    mesh = build_mesh(layout_of(config), device=torch.device("cpu")) if config.world_size > 1 else lone_mesh()
    return build(config, mesh=mesh, weights=perturbed_weights(config))


def parameters(training: Training) -> dict[str, Tensor]:
    return {name: training.engine.whole_master(name) for name, _ in training.named_parameters()}


def trained(config: RunConfig, stashes: bool = True) -> dict[str, Tensor]:
    """This rank's parameters after the steps. stashes: False for backwards with whatever weights are the newest."""
    training = built(config)
    with pytest.MonkeyPatch.context() as patch:
        if not stashes:
            patch.setattr(AsynchronousUpdates, "_weights_of", _no_weights)
        for step in range(NUM_STEPS):
            train_step(training, list(proof_batch(config, step, training.mesh.dp.index)))
    return parameters(training)


@contextmanager
def _no_weights(self: AsynchronousUpdates, version: int) -> Iterator[None]:
    yield


def test_on_one_rank_it_is_a_step_for_each_microbatch() -> None:
    stashing = config(STASHING)
    training = built(config("train.global_batch_size=1"))
    for step in range(NUM_STEPS):
        for batch in proof_batch(stashing, step, 0):
            train_step(training, [batch])
    found, expected = trained(stashing), parameters(training)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    synchronous = trained(config())
    assert not torch.equal(found["head.weight"], synchronous["head.weight"])


def played(config: RunConfig) -> dict[str, Tensor]:
    """One process; stage r's weights for the forward of microbatch m are those after the backwards before it."""
    whole = build(config_of_one(config), mesh=lone_mesh(), weights=perturbed_weights(config))
    model, settings = whole.runner.model, config.optim
    names = [name for name, _ in model.named_parameters()]
    stage_of = {name: chunk_of(name, (2, 2)) for name in names}
    versions: list[list[dict[str, Tensor]]] = [
        [{name: model.get_parameter(name).detach().clone() for name in names if stage_of[name] == r}] for r in range(2)
    ]
    states: list[dict[str, Any]] = [{name: [0.0, 0.0] for name in versions[r][0]} for r in range(2)]
    lists, updates = schedule_of(config).lists, 0
    for step in range(NUM_STEPS):
        for m, batch in enumerate(proof_batch(config, step, 0)):
            for r, instructions in enumerate(lists):
                before = instructions[: instructions.index(Instruction(Kind.FORWARD, r, m))]
                num_updates = sum(one.kind is Kind.BACKWARD for one in before)
                used = versions[r][step * NUM_MICROBATCHES + num_updates]
                for name, value in used.items():
                    model.get_parameter(name).data.copy_(value)
            gradients = gradients_of(model, batch)
            updates += 1
            for r in range(2):
                newest = versions[r][-1]
                versions[r].append(
                    {name: adamw(newest[name], gradients[name], states[r], name, updates, settings) for name in newest}
                )
    return {**versions[0][-1], **versions[1][-1]}


def config_of_one(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"pp": 1})})


def gradients_of(model: Any, batch: Any) -> dict[str, Tensor]:
    like = torch.empty((), dtype=torch.float64)
    sequences = model.sequences(*batch.tokens.shape, batch.positions, batch.documents, like)
    loss = model(batch.tokens, sequences, batch.targets) / int((batch.targets >= 0).sum())
    pairs = list(model.named_parameters())
    for _, parameter in pairs:
        parameter.grad = None
    loss.backward()
    return {name: parameter.grad for name, parameter in pairs}


def adamw(value: Tensor, gradient: Tensor, state: dict[str, Any], name: str, step: int, settings: Any) -> Tensor:
    """Kingma and Ba 2015, algorithm 1."""
    mean, square = state[name]
    mean = settings.beta1 * mean + (1 - settings.beta1) * gradient
    square = settings.beta2 * square + (1 - settings.beta2) * gradient**2
    state[name] = [mean, square]
    root = (square / (1 - settings.beta2**step)).sqrt() + settings.eps
    return value - settings.lr * (mean / (1 - settings.beta1**step)) / root


@pytest.mark.parametrize("schedule", ["1f1b", "eager-1f1b", "gpipe"])
def test_two_stages_use_the_weights_of_the_forward(pool: WorkerPool, schedule: str) -> None:
    two = config(STASHING, "parallel.pp=2", f"parallel.schedule={schedule}", world_size=2)
    expected = played(two)
    for stashes in (True, False):
        results = pool.run(trained, 2, two, stashes)
        found = {**results[0], **results[1]}
        assert found.keys() == expected.keys()
        apart = max(float((found[name] - expected[name]).abs().max()) for name in expected)
        assert apart < 1e-12 if stashes else apart > 1e-6, apart


def test_data_parallel_ranks_and_zero_stages_agree(pool: WorkerPool) -> None:
    results = []
    for zero in (0, 1):
        keys = (STASHING, "parallel.pp=2", f"parallel.zero_stage={zero}", "train.global_batch_size=12")
        results.append(pool.run(trained, 4, config(*keys, world_size=4)))
    for one, other in zip(*results, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    for first, second in ((0, 1), (2, 3)):  # pp is the slower axis
        assert all(torch.equal(results[0][first][name], results[0][second][name]) for name in results[0][first])


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("parallel.schedule=zb-v", "has no asynchronous form"),
        ("model.tie_embeddings=true", "the first and the last stage share"),
        ("optim.clip_grad_norm=1", "must be 0 with parallel.weight_stashing"),
    ],
)
def test_what_it_cannot_be_with(key: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        config(STASHING, "parallel.pp=2", key, world_size=2)
    for problem in caught.value.problems:
        for fix in problem.fixes:
            config(STASHING, "parallel.pp=2", key, *fix, world_size=1 if "parallel.pp=1" in fix else 2)
