"""A run whose global batch grows: sizes, schedules, data, and a resume in the middle, in every layout."""

from __future__ import annotations

import dataclasses
import io
import json
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from megatron_lite.config import RunConfig
from megatron_lite.config.problems import override
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.pipeline.timeline import read_timeline
from megatron_lite.train.metrics import StepRecord
from megatron_lite.train.progress import ConsoleSink
from megatron_lite.utils import run_files
from tests.train.test_resume import run
from tests.train.tiny_run import SEQ_LEN, read_metrics, same_numbers, tiny_config

# From 2 to 8 by 2 over 18 samples: 3 increments, one after each 6. By hand: a batch begins after 0, 2, 4 samples with
# 2, after 6 and 10 with 4, after 14 with 6, and from 20 on with 8.
SIZES = [2, 2, 2, 4, 4, 6, 8, 8, 8]
RAMP = "train.batch_rampup=[2,2,18]"
STEPS = (
    f"train.num_steps={len(SIZES)}", f"optim.decay_steps={len(SIZES)}", "optim.warmup_steps=2", "train.eval_interval=0",
    "train.micro_batch_size=1", "model.num_layers=4", "checkpoint.interval=1", "checkpoint.keep_last=99",
    "data.valid=[]",
)  # fmt: skip
PIPELINES = {
    "1f1b": ("parallel.pp=2", "run.record_pipeline=1"),
    "zb-h1": ("parallel.pp=2", "parallel.schedule=zb-h1", "model.tie_embeddings=false", "parallel.recompute=full"),
    # On the second rank no backward is split with up to 3 microbatches, and some are with 4 and more.
    "dualpipe-v": ("parallel.pp=2", "parallel.schedule=dualpipe-v", "parallel.virtual_stages=2"),
}


def config_of(corpus: Path, out: Path, name: str, *more: str, world_size: int = 1) -> RunConfig:
    return tiny_config(corpus, out, name, *STEPS, *more, world_size=world_size)


def sizes_of(folder: Path) -> list[int]:
    """Sequences of each step, from the tokens that it counted."""
    counts = [0, *(record["tokens"] for record in read_metrics(folder))]
    assert all(count % SEQ_LEN == 0 for count in counts)
    return [int(after - before) // SEQ_LEN for before, after in pairwise(counts)]


def position_after(folder: Path, step: int) -> dict[str, int]:
    path = folder / "checkpoints" / f"step-{step:08}" / "checkpoint.json"
    position: dict[str, int] = json.loads(path.read_text())["state"]["position"]
    return position


@pytest.fixture(scope="module")
def single(pool: WorkerPool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with the ramp in one process. Not to be changed."""
    folder = tmp_path_factory.mktemp("ramp")
    said = run(pool, config_of(corpus, folder, "single", RAMP))
    assert f"9 steps of up to {8 * SEQ_LEN} tokens" in said
    return folder / "single"


def test_the_sizes_are_those_by_hand(single: Path) -> None:
    assert sizes_of(single) == SIZES
    for step in range(1, len(SIZES) + 1):
        assert position_after(single, step)["samples"] == sum(SIZES[:step])


def test_it_is_a_chain_of_runs_of_one_size_each(pool: WorkerPool, corpus: Path, tmp_path: Path, single: Path) -> None:
    """The oracle: the same steps by hand, the batch size changed and the run resumed whenever the table says so."""
    for last, size in ((3, 2), (5, 4), (6, 6), (9, 8)):
        more = (f"train.global_batch_size={size}", f"train.num_steps={last}")
        run(pool, config_of(corpus, tmp_path, "chain", *more))
    assert sizes_of(tmp_path / "chain") == SIZES
    assert same_numbers(tmp_path / "chain", single) == []


def test_a_ramp_of_another_length_is_another_run(pool: WorkerPool, corpus: Path, tmp_path: Path, single: Path) -> None:
    """Negative control of the comparison in every bit."""
    run(pool, config_of(corpus, tmp_path, "longer", "train.batch_rampup=[2,2,24]"))
    assert sizes_of(tmp_path / "longer")[:4] == [2, 2, 2, 2]
    assert same_numbers(tmp_path / "longer", single)[0].endswith("of step 4")


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_change_no_bit(pool: WorkerPool, corpus: Path, tmp_path: Path, single: Path, name: str) -> None:
    run(pool, config_of(corpus, tmp_path, name, RAMP, *PIPELINES[name], world_size=2))
    assert same_numbers(tmp_path / name, single) == []
    if name == "1f1b":  # the first step, of the smallest batch, is recorded as what it was
        assert read_timeline(tmp_path / name / run_files.PIPELINE).num_microbatches == SIZES[0]


def precise_keys(corpus: Path) -> tuple[str, ...]:
    """float64, and evaluations on the way: these take batches of full size."""
    valid = override("data.valid", [str(corpus / "valid")])
    return "train.precision=fp64", valid, "train.eval_interval=4", "checkpoint.interval=0"


@pytest.fixture(scope="module")
def precise(pool: WorkerPool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The records of the run in one process, in float64."""
    folder = tmp_path_factory.mktemp("precise")
    run(pool, config_of(corpus, folder, "one", RAMP, *precise_keys(corpus)))
    return read_metrics(folder / "one")


@pytest.mark.parametrize(
    ("world_size", "keys"),
    [
        (2, ("parallel.zero_stage=0",)),
        (2, ("parallel.zero_stage=1",)),
        (8, ("parallel.tp=2", "parallel.pp=2")),
    ],
    ids=["zero 0", "zero 1", "tp2-pp2-dp2"],
)
def test_data_parallel_ranks_compute_what_one_process_does(
    pool: WorkerPool,
    corpus: Path,
    tmp_path: Path,
    precise: list[dict[str, float]],
    world_size: int,
    keys: tuple[str, ...],
) -> None:
    """1e-10 relative in float64: what the design bounds a change of dp and tp by."""
    run(pool, config_of(corpus, tmp_path, "two", RAMP, *precise_keys(corpus), *keys, world_size=world_size))
    records = read_metrics(tmp_path / "two")
    assert sizes_of(tmp_path / "two") == SIZES
    for key in ("loss", "grad_norm", "valid_loss"):
        values = [record[key] for record in precise if key in record]
        assert [record[key] for record in records if key in record] == pytest.approx(values, rel=1e-10)
        assert len(set(values)) == (3 if key == "valid_loss" else len(SIZES))


@pytest.mark.parametrize("more", [(), ("parallel.pp=2",)], ids=["single", "pp 2"])
def test_a_resume_in_the_middle_is_bitwise(
    pool: WorkerPool, corpus: Path, tmp_path: Path, single: Path, more: tuple[str, ...]
) -> None:
    """Cut off in step 5, at a size on the way, and again in step 7, the first of full size."""
    config = config_of(corpus, tmp_path, "again", RAMP, *more, world_size=2 if more else 1)
    run(pool, config, 5)
    assert position_after(tmp_path / "again", 4)["samples"] == 10
    assert "after step 4" in run(pool, config, 7) and "after step 6" in run(pool, config)
    assert same_numbers(tmp_path / "again", single) == []


def test_without_the_samples_the_size_is_another(pool: WorkerPool, corpus: Path, tmp_path: Path) -> None:
    """Negative control: the position that is given back decides the size."""
    config = config_of(corpus, tmp_path, "forgetful", RAMP)
    run(pool, config, 5)
    run(pool, config, forgets="samples")
    assert sizes_of(tmp_path / "forgetful") == [2, 2, 2, 4, 2, 2, 2, 4, 4]


def test_asynchronous_updates_take_the_microbatches_that_there_are(
    pool: WorkerPool, corpus: Path, tmp_path: Path
) -> None:
    keys = ("parallel.pp=2", "parallel.weight_stashing=true", "optim.clip_grad_norm=0")
    run(pool, config_of(corpus, tmp_path, "stashing", RAMP, *keys, world_size=2))
    assert sizes_of(tmp_path / "stashing") == SIZES


RECORD = StepRecord(
    step=1, tokens=64, loss=5.5, grad_norm=1.25, lr=1e-3, loss_scale=1.0, step_time_s=1.0, tokens_per_s=64.0, mfu=0.4,
    peak_memory_bytes=2**30,
)  # fmt: skip


def shown(config: RunConfig, *, is_terminal: bool = False, first: int = 1) -> str:
    """What a console shows of steps that take a second for each sequence."""
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=200)
    sink = ConsoleSink(config.train, console, first - 1, sum(SIZES[: first - 1]))
    for step, size in enumerate(SIZES[first - 1 :], start=first):
        sink.write(dataclasses.replace(RECORD, step=step, step_time_s=float(size)))
    sink.close(succeeded=True)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("first", [1, 5])
def test_the_time_that_is_left_goes_by_samples(corpus: Path, tmp_path: Path, first: int) -> None:
    lines = shown(config_of(corpus, tmp_path, "eta", RAMP), first=first).splitlines()
    left = [sum(SIZES[step:]) for step in range(first, len(SIZES))]
    assert [line.partition("ETA ")[2] for line in lines] == [*(f"0:00:{seconds:02}" for seconds in left), ""]
    assert lines[-1].startswith("step 9/9")


def test_a_terminal_counts_steps(corpus: Path, tmp_path: Path) -> None:
    assert "step 9/9" in shown(config_of(corpus, tmp_path, "bar", RAMP), is_terminal=True)
