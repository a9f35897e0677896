"""A number that is none ends a run on every rank, with one error that says where it was made."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_lite.distributed.worker_pool import WorkerError, WorkerPool
from megatron_lite.report.run import read_run
from tests.train.poison import LOSS, Poison, job
from tests.train.tiny_run import read_metrics, tiny_config

NAN = float("nan")
SHORT = (
    "train.num_steps=3", "optim.warmup_steps=0", "train.eval_interval=2", "checkpoint.interval=1",
    "checkpoint.asynchronous=false", "train.eval_batches=1",
)  # fmt: skip
UP, NORM, HEAD = "layers.1.mlp.up.weight", "layers.0.attention_norm.weight", "head.weight"


def ends_with(
    pool: WorkerPool, corpus: Path, tmp_path: Path, keys: tuple[str, ...], *poisons: Poison, world_size: int = 2
) -> str:
    """The error that all ranks end with in the second step. The steps before, and their checkpoint, are kept."""
    config = tiny_config(corpus, tmp_path, "bad", *SHORT, *keys, world_size=world_size)
    with pytest.raises(WorkerError) as caught:
        pool.run(job, world_size, config, poisons, timeout_s=120)
    summaries = {failure.summary for failure in caught.value.failures}
    assert len(caught.value.failures) == world_size and len(summaries) == 1, "the same on every rank"
    (summary,) = summaries
    assert "DivergedError: step 2: the " in summary and "lower optim.lr" in summary
    first, fatal = read_metrics(tmp_path / "bad")
    assert fatal["step"] == 2 and "valid_loss" not in fatal
    assert not {"loss", "grad_norm"} <= fatal.keys() and {"loss", "grad_norm"} <= first.keys(), "what is no number"
    assert [record["step"] for record in read_run(tmp_path / "bad").records] == [1, 2], "a report has both"
    assert [path.name for path in (tmp_path / "bad" / "checkpoints").iterdir()] == ["step-00000001"]
    return summary


# keys, what is poisoned, and what is said
PLACES: dict[str, tuple[tuple[str, ...], Poison, str]] = {
    # In fp32 a product adds to the sum over microbatches by itself.
    "dp2 fp32": (
        (),
        Poison(UP, rank=1, microbatch=1, value=NAN),
        rf"on rank 1 \(dp 1\) the gradient of {UP} has 1 NaN of \d+ elements in microbatch 1 of 2, counted from 0",
    ),
    "dp2 fp32 bias": (
        ("model.family=gpt2", "model.num_kv_heads=4"),
        Poison("layers.1.mlp.up.bias", rank=0, microbatch=0, value=NAN),
        r"on rank 0 \(dp 0\) the gradient of layers\.1\.mlp\.up\.bias has 1 NaN of \d+ elements in microbatch 0 of 2",
    ),
    "dp2 bf16": (
        ("train.precision=bf16",),
        Poison(UP, rank=0, microbatch=1, value=NAN),
        rf"on rank 0 \(dp 0\) the gradient of {UP} has 1 NaN of \d+ elements in microbatch 1 of 2",
    ),
    "tp2 fp32, infinite": (
        ("parallel.tp=2",),
        Poison(HEAD, rank=1, microbatch=3),
        rf"on rank 1 \(tp 1\) the gradient of {HEAD} has 1 infinite of \d+ elements in microbatch 3 of 4",
    ),
    "pp2 split backward": (
        ("parallel.pp=2", "parallel.schedule=zb-h1"),
        Poison("layers.0.attention.out.weight", rank=0, microbatch=2, value=NAN),
        r"on rank 0 \(pp 0\) the gradient of layers\.0\.attention\.out\.weight has 1 NaN of \d+ elements in "
        r"microbatch 2 of 4",
    ),
    "pp2 virtual stages bf16": (
        ("parallel.pp=2", "parallel.schedule=interleaved", "model.num_layers=4", "train.precision=bf16"),
        Poison("layers.2.mlp.up.weight", rank=0, microbatch=1, value=NAN),
        r"on rank 0 \(pp 0\) the gradient of layers\.2\.mlp\.up\.weight has 1 NaN of \d+ elements in microbatch 1 of 4",
    ),
    "the loss": (
        ("parallel.pp=2",),
        Poison(LOSS, rank=1, microbatch=1, value=NAN),
        r"the loss is nan, at learning rate \S+: on rank 1 \(pp 1\) the loss is nan in microbatch 1 of 4",
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_source_is_named(pool: WorkerPool, corpus: Path, tmp_path: Path, place: str) -> None:
    keys, poison, message = PLACES[place]
    summary = ends_with(pool, corpus, tmp_path, keys, poison)
    assert re.search(message, summary), summary


def test_the_first_microbatch_is_named_and_in_it_the_last_layer(pool: WorkerPool, corpus: Path, tmp_path: Path) -> None:
    late, early = Poison(HEAD, rank=0, microbatch=1, value=NAN), Poison(NORM, rank=1, microbatch=0, value=NAN)
    deeper = Poison(UP, rank=1, microbatch=0, value=NAN)
    keys = ("train.precision=bf16",)
    assert f"on rank 1 (dp 1) the gradient of {NORM}" in ends_with(pool, corpus, tmp_path / "1", keys, late, early)
    said = ends_with(pool, corpus, tmp_path / "2", keys, late, early, deeper)
    assert f"on rank 1 (dp 1) the gradient of {UP}" in said and "microbatch 0" in said


def test_what_does_not_happen_again_is_a_fault_of_the_machine(pool: WorkerPool, corpus: Path, tmp_path: Path) -> None:
    """Negative control: the source is found by running again, and is not what the test says it is."""
    said = ends_with(pool, corpus, tmp_path, (), Poison(UP, value=NAN, once=True))
    assert "run again, the same microbatches give numbers: look for a fault of the machine" in said


def test_a_sum_over_ranks_that_overflows(pool: WorkerPool, corpus: Path, tmp_path: Path) -> None:
    """Each rank's gradient is a number, and so is the square of it in float64: their sum in fp32 is none."""
    poisons = (Poison(UP, rank=0, microbatch=0, value=3e38), Poison(UP, rank=1, microbatch=0, value=3e38))
    said = ends_with(pool, corpus, tmp_path, (), *poisons)
    assert "the gradients of all microbatches are numbers, and their sum over microbatches or ranks is beyond" in said
