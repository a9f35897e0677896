"""Whole runs with their state in files: evaluation, checkpoints, resuming, with offload on and off in turn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_lite.config import RunConfig
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.train import memory
from megatron_lite.train.build import layout_of
from megatron_lite.utils.memory import MemoryLimit
from tests.train.test_resume import job
from tests.train.tiny_run import NUM_STEPS, make_corpus, read_metrics, same_numbers, tiny_config

WORLD_SIZE = 2
KEYS = ("parallel.zero_stage=3", "train.precision=bf16", "checkpoint.interval=3", "checkpoint.keep_last=9")
CUT_OFF_AT = 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def in_files(folder: Path) -> tuple[str, ...]:
    folder.mkdir(exist_ok=True)
    return (*(f"offload.{what}=nvme" for what in ("optimizer", "gradients", "parameters")), f"offload.dir={folder}")


def train(
    pool: WorkerPool, corpus: Path, out: Path, *keys: str, world_size: int = WORLD_SIZE, **options: object
) -> Path:
    config = tiny_config(corpus, out, "tiny", *KEYS, *keys, world_size=world_size)
    pool.run(job, world_size, config, timeout_s=240, **options)
    return out / "tiny"


@pytest.fixture(scope="module")
def undisturbed(pool: WorkerPool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(pool, corpus, tmp_path_factory.mktemp("undisturbed"))


def test_losses_evaluations_and_all_are_those_without_files(
    pool: WorkerPool, corpus: Path, tmp_path: Path, undisturbed: Path
) -> None:
    scratch = tmp_path / "scratch"
    run = train(pool, corpus, tmp_path, *in_files(scratch))
    assert same_numbers(run, undisturbed) == [] and list(scratch.iterdir()) == []
    assert sum("valid_loss" in record for record in read_metrics(run)) >= 3


@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)])
def test_a_run_goes_on_with_files_or_without(
    pool: WorkerPool, corpus: Path, tmp_path: Path, undisturbed: Path, before: bool, after: bool
) -> None:
    files = in_files(tmp_path / "scratch")
    train(pool, corpus, tmp_path, *(files if before else ()), cut_off_at=CUT_OFF_AT)
    run = train(pool, corpus, tmp_path, *(files if after else ()))
    assert len(read_metrics(run)) == NUM_STEPS
    assert same_numbers(run, undisturbed) == []


def test_what_is_forgotten_shows(pool: WorkerPool, corpus: Path, tmp_path: Path, undisturbed: Path) -> None:
    """Negative control: moments that are not given back to the files."""
    files = in_files(tmp_path / "scratch")
    train(pool, corpus, tmp_path, *files, cut_off_at=CUT_OFF_AT)
    run = train(pool, corpus, tmp_path, *files, forgets="moments")
    assert same_numbers(run, undisturbed) != []


def test_another_layout_reads_the_same_from_either(pool: WorkerPool, corpus: Path, tmp_path: Path) -> None:
    """The checkpoint of a run with files on 2 ranks goes on with files under tp, as that of one without on its own."""
    runs = []
    for name in ("files", "memory"):
        out = tmp_path / name
        out.mkdir()
        files = in_files(out / "scratch") if name == "files" else ()
        train(pool, corpus, out, *files, cut_off_at=CUT_OFF_AT)
        runs.append(train(pool, corpus, out, *files, "parallel.tp=2"))
    assert same_numbers(*runs) == [] and len(read_metrics(runs[0])) == NUM_STEPS


def settled(config: RunConfig, limits: list[int | None]) -> str:
    """limits: of each rank."""
    mesh = build_mesh(layout_of(config), device=torch.device("cpu"))
    limit = limits[mesh.rank]
    before = memory.memory_limit
    memory.memory_limit = lambda: None if limit is None else MemoryLimit(limit, "a test")  # type: ignore[assignment]
    try:
        return memory.with_gather_policy(config, mesh).parallel.gather_policy
    finally:
        memory.memory_limit = before


@pytest.mark.parametrize(
    ("limits", "policy"),
    [
        ([1 << 40, 1 << 40], "keep"),
        ([None, None], "regather"),
        ([1 << 10, 1 << 10], "regather"),
        ([1 << 40, 1 << 10], "regather"),
    ],
)
def test_parameters_are_kept_where_every_rank_has_room(
    pool: WorkerPool, corpus: Path, tmp_path: Path, limits: list[int | None], policy: str
) -> None:
    config = tiny_config(corpus, tmp_path, "tiny", *KEYS, world_size=WORLD_SIZE)
    assert config.parallel.gather_policy == "auto"
    assert pool.run(settled, WORLD_SIZE, config, limits) == [policy] * WORLD_SIZE
    asked = tiny_config(corpus, tmp_path, "tiny", *KEYS, "parallel.gather_policy=regather", world_size=WORLD_SIZE)
    assert pool.run(settled, WORLD_SIZE, asked, limits) == ["regather"] * WORLD_SIZE
