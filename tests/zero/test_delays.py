"""Races: with every collective and every message delayed at random, differently on each rank, no bit changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from megatron_lite.config import RunConfig, load_config
from megatron_lite.distributed import collectives
from megatron_lite.distributed.mesh import Mesh, build_mesh
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.train.build import build, layout_of
from megatron_lite.train.step import apply_gradients, compute_gradients
from megatron_lite.verify.trial import perturbed_weights, proof_batch
from megatron_lite.zero.bucket import Bucket
from megatron_lite.zero.gather import Gathering
from megatron_lite.zero.gradients import Gradients
from megatron_lite.zero.reduce import Reduction
from tests.zero.late import late

_MODEL = (
    "model.family=llama",
    "model.tie_embeddings=true",
    "model.vocab_size=97",
    "model.hidden_size=32",
    "model.num_layers=4",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.ffn_hidden_size=48",
    "model.max_seq_len=16",
    "train.seq_len=8",
    "train.global_batch_size=8",
    "train.num_steps=3",
    "optim.lr=0.01",
    "optim.eps=1e-4",
)
NUM_STEPS = 3  # in the third, parameters are gathered ahead that the second has changed
CASES = {
    "stage 1": (4, "parallel.pp=2 parallel.zero_stage=1"),
    "stage 2": (4, "parallel.pp=2 parallel.zero_stage=2 train.precision=bf16"),
    "stage 2, fp32": (2, "parallel.zero_stage=2"),
    "stage 2, split backward": (4, "parallel.pp=2 parallel.schedule=zb-v parallel.zero_stage=2"),
    "stage 2, one sum": (2, "parallel.zero_stage=2 parallel.reduce_policy=step"),
    "stage 3": (4, "parallel.pp=2 parallel.zero_stage=3"),
    "stage 3, over four": (4, "parallel.zero_stage=3 parallel.recompute=full"),
    "stage 3, two groups": (4, "parallel.zero_stage=3 parallel.zero_group=2 train.precision=bf16"),
    "stage 3, kept, tp": (
        4,
        "parallel.tp=2 parallel.sequence_parallel=true parallel.zero_stage=3 parallel.gather_policy=keep",
    ),
}


def config_of(case: str) -> tuple[int, RunConfig]:
    world_size, keys = CASES[case]
    return world_size, load_config(None, [*_MODEL, *keys.split()], world_size=world_size)


def run(config: RunConfig, mesh: Mesh) -> list[torch.Tensor]:
    """Everything that this rank computes: losses and norms, gradients of the last step, weights after it."""
    training = build(config, mesh=mesh, weights=perturbed_weights(config))
    numbers = []
    for step in range(NUM_STEPS):
        loss, _ = compute_gradients(training, list(proof_batch(config, step, mesh.dp.index)))
        sums = [bucket.sums.clone() for bucket in training.engine.buckets.values()]
        numbers += [loss, apply_gradients(training)[0]]
    masters = [bucket.master for bucket in training.engine.updated_buckets()]
    return [torch.tensor(numbers, dtype=torch.float64), *sums, *masters]


def differing_runs(config: RunConfig, num_runs: int, spoil: Callable[[], object] | None) -> list[int]:
    """Of so many runs with delays, those that differ in a bit from one without; ``spoil`` breaks the engine in them."""
    mesh = build_mesh(layout_of(config), device=torch.device("cpu"), zero_group=config.parallel.zero_group)
    expected = run(config, mesh)
    differing = []
    for number in range(num_runs):
        with late(f"{number}/{mesh.rank}") as delays, spoil() if spoil is not None else nothing():
            found = run(config, mesh)
        assert delays.num_delayed > 50
        if not all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)):
            differing.append(number)
        collectives.barrier(mesh.world)
    return differing


@contextmanager
def nothing() -> Iterator[None]:
    yield


@pytest.mark.parametrize("case", CASES)
def test_delays_change_no_bit(pool: WorkerPool, case: str) -> None:
    world_size, config = config_of(case)
    assert pool.run(differing_runs, world_size, config, 4, None) == [[]] * world_size


@pytest.mark.matrix
@pytest.mark.parametrize("case", CASES)
def test_fifty_times(pool: WorkerPool, case: str) -> None:
    world_size, config = config_of(case)
    assert pool.run(differing_runs, world_size, config, 50, None, timeout_s=1800) == [[]] * world_size


# Negative controls: an engine with a race in it.


@contextmanager
def replaced(owner: type, name: str, function: Callable[..., object]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def parameters_that_nobody_waits_for() -> Iterator[None]:
    use, release = Gathering.use, Gathering._release

    def use_at_once(self: Gathering, bucket: Bucket) -> None:
        self._start(bucket.owner)
        self._held[bucket.owner.layout.name].is_whole = True
        use(self, bucket)

    def release_late(self: Gathering, owner: Bucket) -> None:
        if (held := self._held.get(owner.layout.name)) is not None:
            held.pending.wait()  # what is freed must not be written to any longer
        release(self, owner)

    with replaced(Gathering, "use", use_at_once), replaced(Gathering, "_release", release_late):
        yield


@contextmanager
def slices_that_change_while_they_are_sent() -> Iterator[None]:
    """The optimizer's step does not wait for what was gathered ahead of use: here, the update comes before that."""
    start = Gathering._start

    def start_and_forget_to_copy(self: Gathering, owner: Bucket) -> None:
        is_new = owner.layout.name not in self._held
        start(self, owner)
        if is_new:
            kept = owner.values.clone()
            owner.values.zero_()
            self._held[owner.layout.name].pending.wait()
            owner.values.copy_(kept)

    with replaced(Gathering, "_start", start_and_forget_to_copy):
        yield


@contextmanager
def a_buffer_that_is_used_again() -> Iterator[None]:
    """Something else is written where the sum still reads."""
    sum_over_dp = Reduction.sum_over_dp

    def sum_and_reuse(self: Reduction, bucket: Bucket, gradients: torch.Tensor) -> None:
        sum_over_dp(self, bucket, gradients)
        gradients.zero_()

    with replaced(Reduction, "sum_over_dp", sum_and_reuse):
        yield


@contextmanager
def sums_before_the_last_gradient() -> Iterator[None]:
    init = Gradients.__init__

    def expect_one_less(self: Gradients, *args: object, **kwargs: object) -> None:
        init(self, *args, **kwargs)  # type: ignore[arg-type]
        self.num_expected = max(1, self.num_expected - 1)

    with replaced(Gradients, "__init__", expect_one_less), replaced(Gathering, "done", lambda self, bucket: None):
        yield


CONTROLS = {
    "gather": ("stage 3", parameters_that_nobody_waits_for),
    "gather, over four": ("stage 3, over four", parameters_that_nobody_waits_for),
    "slices": ("stage 3", slices_that_change_while_they_are_sent),
    "buffer": ("stage 3, over four", a_buffer_that_is_used_again),
    "buffer at stage 2": ("stage 2, fp32", a_buffer_that_is_used_again),
    "last gradient, kept buffer": ("stage 1", sums_before_the_last_gradient),
    "last gradient": ("stage 3", sums_before_the_last_gradient),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_a_race_is_caught(pool: WorkerPool, control: str) -> None:
    case, spoil = CONTROLS[control]
    world_size, config = config_of(case)
    differing = pool.run(differing_runs, world_size, config, 4, spoil)
    assert any(differing), "no run of four differed in any bit"
