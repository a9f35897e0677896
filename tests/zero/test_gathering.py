"""What the gathering of parameters refuses, and odd runs of stage 3."""

from __future__ import annotations

import pytest
import torch

from megatron_lite.config import RunConfig
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.models.identity import same_bits
from megatron_lite.train.build import Training, build, layout_of
from megatron_lite.train.step import compute_gradients, evaluate, train_step
from megatron_lite.verify.trial import perturbed_weights, proof_batch
from tests.zero.test_engine import config_of


def start(config: RunConfig) -> Training:
    mesh = build_mesh(layout_of(config), device=torch.device("cpu"), zero_group=config.parallel.zero_group)
    return build(config, mesh=mesh, weights=perturbed_weights(config))


def read_stale_slices(config: RunConfig) -> str:
    """An update between the gather ahead of a use and the use, that nobody is told of."""
    training = start(config)
    gathering, bucket = training.engine.gathering, next(training.engine.updated_buckets())
    assert gathering is not None
    with training.engine.running("by hand"):
        gathering.use(bucket)
        gathering._version += 1
        with pytest.raises(AssertionError) as caught:
            gathering.use(bucket)
    return str(caught.value)


def test_a_stale_slice_is_not_read(pool: WorkerPool) -> None:
    config = config_of("parallel.zero_stage=3", world_size=2)
    said = pool.run(read_stale_slices, 2, config)
    assert said == ["embedding is whole from slices that have changed since"] * 2


def gradient_where_none_is_expected(config: RunConfig) -> str:
    training = start(config)
    bucket = training.engine.buckets["layers.0"]
    parameter = next(iter(bucket.parameters.values()))
    parameter.data = torch.zeros(parameter.shape, dtype=parameter.dtype)
    with pytest.raises(AssertionError) as caught:
        (parameter * 1.0).sum().backward()
    return str(caught.value)


def test_a_gradient_outside_a_backward_of_the_schedule_is_refused(pool: WorkerPool) -> None:
    config = config_of("parallel.zero_stage=2", "train.precision=bf16", world_size=1)
    (said,) = pool.run(gradient_where_none_is_expected, 1, config)
    assert "came where none was expected" in said


def memory_between_steps(config: RunConfig) -> tuple[list[int], list[float]]:
    """Bytes of whole parameters after a step and after an evaluation, and the evaluated losses around it."""
    training, left, losses = start(config), list[int](), list[float]()
    batches = list(proof_batch(config, 0, training.mesh.dp.index))

    def look() -> None:
        left.append(sum(b.flat.untyped_storage().nbytes() for b in training.engine.updated_buckets()))

    for _ in range(2):
        losses.append(evaluate(training, batches)[0])
        look()
        train_step(training, batches)
        look()
    losses.append(evaluate(training, batches)[0])
    return left, losses


@pytest.mark.parametrize(
    "keys", ["", "parallel.gather_policy=keep", "model.tie_embeddings=true parallel.recompute=full"]
)
def test_an_evaluation_between_steps_uses_the_newest_parameters(pool: WorkerPool, keys: str) -> None:
    model = [key for key in keys.split() if key.startswith("model.")]
    results = pool.run(memory_between_steps, 2, config_of(*keys.split(), "parallel.zero_stage=3", world_size=2))
    whole = pool.run(memory_between_steps, 2, config_of(*model, world_size=2))
    for (left, losses), (_, expected) in zip(results, whole, strict=True):
        assert losses == expected and len(set(losses)) == 3
        assert set(left) == {0}, "nothing is whole between steps"


def stash(config: RunConfig) -> tuple[list[float], list[torch.Tensor]]:
    training, losses = start(config), list[float]()
    for step in range(3):
        losses.append(train_step(training, list(proof_batch(config, step, training.mesh.dp.index))).loss)
    return losses, [training.engine.whole_master(name) for name, _ in training.named_parameters()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weight_stashing_does_not_depend_on_the_stage(pool: WorkerPool, precision: str) -> None:
    keys = ("parallel.pp=2", "parallel.weight_stashing=true", "optim.clip_grad_norm=0", f"train.precision={precision}",
            "train.global_batch_size=8")  # fmt: skip
    expected = pool.run(stash, 4, config_of(*keys, "parallel.zero_stage=0", world_size=4))
    for stage in (1, 2, 3):
        found = pool.run(stash, 4, config_of(*keys, f"parallel.zero_stage={stage}", world_size=4))
        for (losses, weights), (right_losses, right) in zip(found, expected, strict=True):
            assert losses == right_losses and all(map(same_bits, weights, right)), stage


def gradients_twice(config: RunConfig) -> bool:
    """The second time the order of uses is known, and parameters come ahead of use."""
    training, found = start(config), []
    for _ in range(2):
        compute_gradients(training, list(proof_batch(config, 0, training.mesh.dp.index)))
        found.append([bucket.sums.clone() for bucket in training.engine.buckets.values()])
    return all(map(torch.equal, *found)) and any(map(torch.any, found[0]))


def test_what_comes_ahead_is_what_comes_when_it_is_needed(pool: WorkerPool) -> None:
    config = config_of("parallel.zero_stage=3", "model.tie_embeddings=true", world_size=2)
    assert pool.run(gradients_twice, 2, config) == [True, True]
