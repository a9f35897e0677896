"""Runs in fp16 that overflow: all ranks skip the same steps, nothing of a skipped step stays, and the run recovers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_lite.config import RunConfig, load_config
from megatron_lite.data import IndexedWriter
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.worker_pool import WorkerError, WorkerPool
from megatron_lite.train.build import Training, build, layout_of
from megatron_lite.train.diagnose import remedy
from megatron_lite.train.faults import remove_reduction
from megatron_lite.train.step import StepResult, train_step
from megatron_lite.verify.trial import proof_batch
from tests.report.run_folder import KEYS
from tests.train.poison import Poison, Story, job
from tests.train.tiny_run import read_metrics, same_numbers, tiny_config

LAYOUTS: dict[str, tuple[str, ...]] = {
    "dp2": ("parallel.zero_stage=0",),
    "tp2": ("parallel.tp=2",),
    "pp2": ("parallel.pp=2",),
}
LONG_STEPS = 100
GROUP, NUM_GROUPS = 30, 10
SHORT = ("train.precision=fp16", "train.eval_interval=0", "train.eval_batches=1")
# Warm-up is longer than the row of skips at the start: Adam's first updates are large, and to skip them makes a
# difference that is still there at the end.
LONG = (
    "train.eval_interval=0", "train.eval_batches=8", "checkpoint.save_last=false", "data.tokenizer=null",
    "train.micro_batch_size=2", f"train.num_steps={LONG_STEPS}", f"optim.decay_steps={LONG_STEPS}",
    "optim.warmup_steps=12", "optim.lr=0.02", "optim.min_lr=0.0",
)  # fmt: skip
# From 2^40 down to 2^16 in three steps, and up again every ten.
TOO_HIGH = (
    "train.precision=fp16", f"loss_scale.initial={2.0**40}", "loss_scale.hysteresis=1",
    f"loss_scale.backoff={2.0**-8}", "loss_scale.growth_interval=10",
)  # fmt: skip


def run(pool: WorkerPool, config: RunConfig, *arguments: Any) -> list[Story]:
    return pool.run(job, config.world_size, config, *arguments, timeout_s=180)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens of which the group follows from the one before, and the rest from nothing: no run can learn it by heart,
    and all of them end at the same loss, whatever single steps do."""
    folder, random = tmp_path_factory.mktemp("chain"), np.random.default_rng(0)
    odds = 1 / np.arange(1, GROUP + 1)
    for name, size in (("train", 60_000), ("valid", 9_000)):
        tokens = GROUP * (np.arange(size) % NUM_GROUPS) + random.choice(GROUP, size, p=odds / odds.sum())
        with IndexedWriter(folder / name, "uint16") as writer:
            writer.append([int(token) for token in tokens])
            writer.end_document()
    return folder


@pytest.fixture(scope="module")
def fp32(pool: WorkerPool, chain: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The records of the run in fp32, in one process."""
    config = tiny_config(chain, tmp_path_factory.mktemp("fp32"), "fp32", *LONG)
    run(pool, config)
    return read_metrics(Path(config.run.dir) / "fp32")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_made_to_overflow_recovers(
    pool: WorkerPool, chain: Path, tmp_path: Path, fp32: list[dict[str, float]], layout: str
) -> None:
    """By a scale that is too high, and by one microbatch on one rank."""
    config = tiny_config(chain, tmp_path, layout, *LONG, *TOO_HIGH, *LAYOUTS[layout], world_size=2)
    first, second = run(pool, config, (Poison(steps=(20,)),))
    assert first.steps == second.steps, "all ranks skip the same steps, and have the same scale"
    skipped = [step for step, (is_finite, _) in enumerate(first.steps, 1) if not is_finite]
    assert skipped == [1, 2, 3, 20]
    assert first.num_updates == second.num_updates == LONG_STEPS - 4

    records = read_metrics(tmp_path / layout)
    assert [record["step"] for record in records if "grad_norm" not in record] == skipped
    assert [record["loss_scale"] for record in records[:4]] == [2.0**40, 2.0**32, 2.0**24, 2.0**16]
    assert [record["skipped_steps"] for record in records[:4]] == [1, 2, 3, 3] and records[-1]["skipped_steps"] == 4
    said = re.findall(r"^step (\d+): skipped, .* loss scale of (\S+); (\d+) of the run's", first.said, re.MULTILINE)
    assert [int(step) for step, *_ in said] == skipped and said[3][2] == "4"

    # What the issue asks for. In one process the loss is 0.06 % higher without the four updates.
    assert records[-1]["loss"] == pytest.approx(fp32[-1]["loss"], rel=0.01)
    assert records[-1]["valid_loss"] == pytest.approx(fp32[-1]["valid_loss"], rel=0.01)
    # Negative control: the bound tells a run that is cut short.
    assert fp32[0]["loss"] > 1.5 * fp32[-1]["loss"]
    assert fp32[LONG_STEPS - 75]["loss"] != pytest.approx(fp32[-1]["loss"], rel=0.01)
    # Norm and loss are those of the gradient itself: before weights differ by more than rounding, they are fp32's.
    assert records[3]["loss"] == pytest.approx(fp32[0]["loss"], rel=5e-3)


def decide_alone(training: Training) -> None:
    remove_reduction(training, "gradient-norm")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_that_decide_alone_part(pool: WorkerPool, corpus: Path, tmp_path: Path, layout: str) -> None:
    """Negative control: with a norm of the rank's own part, the poisoned rank skips, the other does not."""
    more = (*SHORT, "train.num_steps=3", "optim.warmup_steps=0", "checkpoint.save_last=false", *LAYOUTS[layout])
    stories = {}
    for name, change in (("together", nothing), ("alone", decide_alone)):
        config = tiny_config(corpus, tmp_path, f"{layout}-{name}", *more, world_size=2)
        stories[name] = run(pool, config, (Poison(),), change)
    first, second = stories["together"]
    assert first.steps == second.steps and [is_finite for is_finite, _ in first.steps] == [True, False, True]
    first, second = stories["alone"]
    assert first.steps != second.steps and first.num_updates != second.num_updates


# Where a gradient may get to the norm by another way: layout and model, and what is poisoned on rank 1.
WAYS: dict[str, tuple[tuple[str, ...], str]] = {
    "a slice": (("parallel.zero_stage=1",), "head.weight"),
    "a slice of sums in fp16": (("parallel.zero_stage=1", "train.grad_dtype=param"), "embedding.tokens.weight"),
    "a shared kv head": (("parallel.tp=2", "model.num_kv_heads=1"), "layers.0.attention.qkv.weight"),
    "a norm under sequence parallelism": (
        ("parallel.tp=2", "parallel.sequence_parallel=true"),
        "layers.1.mlp_norm.weight",
    ),
    "a norm that all tp ranks hold": (("parallel.tp=2",), "layers.1.mlp_norm.weight"),
    "the follower of a tied table on another stage": (
        ("parallel.pp=2", "model.tie_embeddings=true"),
        "head.weight",
    ),
    "the follower of a tied table": (("parallel.tp=2", "model.tie_embeddings=true"), "head.weight"),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_overflow_gets_to_all_ranks(pool: WorkerPool, corpus: Path, tmp_path: Path, way: str) -> None:
    keys, parameter = WAYS[way]
    more = (*SHORT, "train.num_steps=3", "optim.warmup_steps=0", "checkpoint.save_last=false", *keys)
    config = tiny_config(corpus, tmp_path, "way", *more, world_size=2)
    first, second = run(pool, config, (Poison(parameter),))
    assert first.steps == second.steps and [is_finite for is_finite, _ in first.steps] == [True, False, True]


def nothing(training: Training) -> None:
    """Nothing is changed."""


def one_skipped_step(config: RunConfig, poisoned_rank: int) -> tuple[bool, int, list[torch.Tensor], list[torch.Tensor]]:
    """Two steps, of which the second overflows on one rank: was it skipped, and the state before and after it."""
    training = build(config, mesh=build_mesh(layout_of(config), device=torch.device("cpu")))

    def state() -> list[torch.Tensor]:
        memory = [bucket.values for bucket in training.engine.buckets.values()]
        memory += [bucket.master for bucket in training.engine.updated_buckets()]
        memory += [tensor for kept in training.optimizer_states.values() for tensor in kept.tensors.values()]
        return [tensor.clone() for tensor in memory]

    batch = list(proof_batch(config, 0, training.mesh.dp.index))
    train_step(training, batch)
    before = state()
    if training.mesh.rank == poisoned_rank:
        parameter = dict(training.named_parameters())["head.weight"]
        parameter.register_hook(lambda gradient: gradient.masked_fill(torch.ones_like(gradient).bool(), float("inf")))
    is_finite = train_step(training, batch).is_finite
    return is_finite, next(iter(training.optimizer_states.values())).num_steps, before, state()


@pytest.mark.parametrize("grad_dtype", ["fp32", "param"])
@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2 zero 1"])
def test_a_skipped_step_changes_nothing(
    pool: WorkerPool, corpus: Path, tmp_path: Path, layout: str, grad_dtype: str
) -> None:
    keys = LAYOUTS.get(layout, ("parallel.zero_stage=1",))
    config = tiny_config(*(corpus, tmp_path, "skip", *SHORT, f"train.grad_dtype={grad_dtype}", *keys), world_size=2)
    for is_finite, num_updates, before, after in pool.run(one_skipped_step, 2, config, 1, timeout_s=120):
        assert not is_finite and num_updates == 1
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    for is_finite, num_updates, before, after in pool.run(one_skipped_step, 2, config, 9, timeout_s=120):
        # Negative control: without the poison all of it changes but moments of what has no gradient.
        assert is_finite and num_updates == 2
        assert not all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


KEPT = ("checkpoint.interval=3", "checkpoint.keep_last=9", "loss_scale.growth_interval=4", *SHORT)
# What is forgotten at the resume after step 3, and steps that overflow such that it shows.
FORGOTTEN: dict[str, tuple[int, ...]] = {
    "good_steps": (2,),  # at step 6 the scale grows, or does not
    "overflows": (2, 5),  # at step 5 the scale backs off, or does not
    "value": (1, 2),
    "skipped_steps": (2,),
    "updates": (2,),  # AdamW corrects its moments by their number
}


class Forget:
    """Takes a part of the state back to what it is at the start of a run, or to what the step says."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(self, training: Training) -> None:
        assert training.loss_scaler is not None
        if training.num_steps == 0:
            return
        if self.what == "updates":
            for state in training.optimizer_states.values():
                state.num_steps = training.num_steps
        elif self.what == "value":
            training.loss_scaler.value = training.config.loss_scale.initial
        else:
            setattr(training.loss_scaler, self.what, 0)


@pytest.mark.parametrize("what", FORGOTTEN)
def test_a_resume_within_a_growth_interval_is_bitwise(
    pool: WorkerPool, corpus: Path, tmp_path: Path, what: str
) -> None:
    poisons = (Poison(steps=FORGOTTEN[what], rank=0),)
    run(pool, tiny_config(corpus, tmp_path, "whole", *KEPT), poisons)
    for name, change in (("kept", nothing), ("lost", Forget(what))):
        config = tiny_config(corpus, tmp_path, name, *KEPT)
        run(pool, config, poisons, nothing, 5)
        assert len(read_metrics(tmp_path / name)) == 4
        (story,) = run(pool, config, poisons, change)
        assert "after step 3" in story.said
    assert same_numbers(tmp_path / "kept", tmp_path / "whole") == []
    assert same_numbers(tmp_path / "lost", tmp_path / "whole") != [], "negative control"


def test_a_scale_that_never_recovers_ends_the_run(pool: WorkerPool, corpus: Path, tmp_path: Path) -> None:
    more = (*SHORT, "loss_scale.max_skips=3", "checkpoint.interval=2", "parallel.pp=2", "train.micro_batch_size=2")
    config = tiny_config(corpus, tmp_path, "hopeless", *more, world_size=2)
    message = (
        r"LossScaleError: step 7: the gradient norm is nan, and 4 steps in a row were skipped, the last at a loss "
        r"scale of 16384: on rank 1 \(pp 1\) the gradient of head\.weight has 1 infinite of \d+ elements in "
        r"microbatch 1 of 4, counted from 0; the scale could still fall: begin with a smaller loss_scale\.initial "
        r"\(65536\), a smaller loss_scale\.hysteresis \(2\), or allow more skips by loss_scale\.max_skips \(3\)"
    )
    with pytest.raises(WorkerError, match=message) as caught:
        run(pool, config, (Poison(steps=tuple(range(4, 20))),))
    assert len(caught.value.failures) == 2
    assert len({failure.summary for failure in caught.value.failures}) == 1, "one error, the same on every rank"
    assert [record["skipped_steps"] for record in read_metrics(tmp_path / "hopeless")] == [0] * 3 + [1, 2, 3, 4]
    # The last checkpoint is whole: without the poison the run goes on from it.
    stories = run(pool, config)
    assert "after step 6" in stories[0].said
    assert [record["skipped_steps"] for record in read_metrics(tmp_path / "hopeless")] == [0] * 3 + [1, 2] + [3] * 7


@pytest.mark.parametrize(
    ("loss", "scale", "wanted"),
    [
        (2.0, 1024.0, "loss_scale.initial (65536)"),
        (2.0, 1.0, "train.precision=bf16"),  # no smaller one is allowed
        (float("nan"), 1024.0, "train.precision=bf16"),  # no scale changes the loss
    ],
)
def test_advice_about_a_hopeless_scale_is_of_use(loss: float, scale: float, wanted: str) -> None:
    remedies = ("loss_scale.initial (65536)", "train.precision=bf16")
    said = remedy(
        load_config(None, [*KEYS, "train.num_steps=1"], world_size=2), StepResult(loss, float("nan"), 1e-3, 1, scale)
    )
    assert [one for one in remedies if one in said] == [wanted], said
