"""A whole run: what it leaves, that layouts agree on it, and how it refuses and fails."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from megatron_lite.checkpoint.convert import convert_model
from megatron_lite.config import RunConfig, load_config
from megatron_lite.data import IndexedWriter
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.worker_pool import WorkerError, WorkerPool
from megatron_lite.train.build import layout_of
from megatron_lite.train.corpus import tokens_per_byte
from megatron_lite.train.loop import TrainResult, train
from megatron_lite.utils import run_files
from tests.train.tiny_run import (
    BATCH,
    LR,
    NUM_STEPS,
    SEQ_LEN,
    VOCAB_SIZE,
    WARMUP_STEPS,
    read_metrics,
    tiny_config,
)

RECORD_KEYS = [
    "step", "tokens", "loss", "grad_norm", "lr", "loss_scale", "step_time_s", "tokens_per_s", "mfu",
    "peak_memory_bytes",
]  # fmt: skip
EVALUATION_KEYS = ["valid_loss", "valid_bits_per_byte"]
LAYOUTS = {
    "tp2": (2, ("parallel.tp=2",)),
    "pp2": (2, ("parallel.pp=2",)),
    "tp2-pp2-dp2": (8, ("parallel.tp=2", "parallel.pp=2")),
}


def job(config: RunConfig, overwrite: bool = False) -> TrainResult:
    mesh = build_mesh(layout_of(config), device=torch.device("cpu"))
    return train(config, mesh=mesh, overwrite=overwrite)


def run(pool: WorkerPool, config: RunConfig, overwrite: bool = False) -> list[TrainResult]:
    return pool.run(job, config.world_size, config, overwrite, timeout_s=90)


@pytest.fixture(scope="module")
def single(pool: WorkerPool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in one process."""
    config = tiny_config(corpus, tmp_path_factory.mktemp("runs"), "single")
    (result,) = run(pool, config)
    return result.folder


def test_metrics(single: Path) -> None:
    metrics = read_metrics(single)
    assert [record["step"] for record in metrics] == list(range(1, NUM_STEPS + 1))
    for record in metrics:
        evaluated = record["step"] in (5, 10, NUM_STEPS)
        assert list(record) == RECORD_KEYS + EVALUATION_KEYS * evaluated
        assert record["tokens"] == record["step"] * BATCH * SEQ_LEN
        assert record["tokens_per_s"] == pytest.approx(BATCH * SEQ_LEN / record["step_time_s"])
        assert 0 < record["mfu"] < 1
        assert 2**26 < record["peak_memory_bytes"] < 2**33, "torch alone takes more than 64 MiB"
        if record["step"] <= WARMUP_STEPS:
            assert record["lr"] == LR * record["step"] / WARMUP_STEPS
    assert metrics[0]["loss"] == pytest.approx(math.log(VOCAB_SIZE), abs=0.2)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.5
    assert metrics[-1]["valid_loss"] < metrics[4]["valid_loss"]


def test_bits_per_byte_counts_the_bytes_of_the_text(single: Path, corpus: Path) -> None:
    meta = json.loads((corpus / "meta.json").read_text())["valid"]
    text_bytes = (corpus / "valid.txt").stat().st_size
    assert meta["text_bytes"] == text_bytes
    last = read_metrics(single)[-1]
    bits_of_all_tokens = last["valid_loss"] / math.log(2) * meta["tokens"]
    assert last["valid_bits_per_byte"] == pytest.approx(bits_of_all_tokens / text_bytes)


def test_the_text_of_a_pair_is_known_by_either_way_to_write_its_prefix(corpus: Path) -> None:
    known = tokens_per_byte([str(corpus / "valid")])
    assert known is not None and tokens_per_byte([str(corpus / "valid.bin")]) == known
    assert tokens_per_byte([str(corpus / "other")]) is None  # negative control


def test_the_folder_tells_what_was_run(single: Path, corpus: Path) -> None:
    config = load_config(single / run_files.CONFIG)
    assert config == tiny_config(corpus, single.parent, "single")
    utilisation = json.loads((single / run_files.UTILISATION).read_text())
    assert utilisation["peak"]["source"] == "measured matmul"
    last = read_metrics(single)[-1]
    achieved = utilisation["model_flops_per_token"] * last["tokens_per_s"]
    assert last["mfu"] == pytest.approx(achieved / utilisation["peak"]["total_flops_per_s"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(pool: WorkerPool, corpus: Path, tmp_path: Path, single: Path, layout: str) -> None:
    """Also the order of the data: a batch in another order has another loss (see the negative control)."""
    world_size, overrides = LAYOUTS[layout]
    results = run(pool, tiny_config(corpus, tmp_path, layout, *overrides, world_size=world_size))
    assert len({(result.last.loss, result.last.valid_loss, result.last.grad_norm) for result in results}) == 1
    expected, found = read_metrics(single), read_metrics(tmp_path / layout)
    for key in ("loss", "grad_norm", "lr", "tokens"):
        assert [r[key] for r in found] == pytest.approx([r[key] for r in expected], rel=1e-4), key
    for key in EVALUATION_KEYS:
        assert [r.get(key, 0.0) for r in found] == pytest.approx([r.get(key, 0.0) for r in expected], rel=1e-4), key


def test_another_order_of_the_data_gives_other_losses(
    pool: WorkerPool, corpus: Path, tmp_path: Path, single: Path
) -> None:
    """Negative control: the first losses, before weights differ much, already tell two orders apart."""
    run(pool, tiny_config(corpus, tmp_path, "other", "data.shuffle=false", "train.num_steps=4", "optim.decay_steps=12"))
    expected, found = read_metrics(single)[:4], read_metrics(tmp_path / "other")
    assert [r["lr"] for r in found] == [r["lr"] for r in expected]
    assert [r["loss"] for r in found] != pytest.approx([r["loss"] for r in expected], rel=1e-4)


def test_reports_of_two_ranks_are_one_run(pool: WorkerPool, corpus: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("wandb")
    more = ("run.wandb=offline", "run.tensorboard=true", "train.num_steps=3", "optim.warmup_steps=1")
    run(pool, tiny_config(corpus, tmp_path, "told", *more, world_size=2))
    folder, metrics = tmp_path / "told", read_metrics(tmp_path / "told")
    (offline,) = (folder / "wandb").glob("offline-run-*")
    (log,) = offline.glob("*.wandb")
    assert log.stat().st_size > 1000
    events = accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    assert len(list((folder / "tensorboard").iterdir())) == 1
    for key in ("loss", "lr", "tokens_per_s", "valid_loss"):
        expected = {r["step"]: r[key] for r in metrics if key in r}
        assert {e.step: e.value for e in events.Scalars(key)} == pytest.approx(expected, rel=1e-6), "it holds float32"


def test_another_run_is_not_overwritten(pool: WorkerPool, corpus: Path, tmp_path: Path) -> None:
    short = ("train.num_steps=2", "optim.warmup_steps=1", "checkpoint.save_last=false")
    config = tiny_config(corpus, tmp_path, "same", *short, world_size=2)
    run(pool, config)
    before = (tmp_path / "same" / run_files.METRICS).read_bytes()
    with pytest.raises(WorkerError, match=r"same: holds a run already.*--overwrite") as caught:
        run(pool, config)
    assert len(caught.value.failures) == 2, "the rank that did not look has to hear of it"
    assert (tmp_path / "same" / run_files.METRICS).read_bytes() == before
    run(pool, config, overwrite=True)
    assert len(read_metrics(tmp_path / "same")) == 2
    assert (tmp_path / "same" / run_files.METRICS).read_bytes() != before


def test_a_loss_that_is_no_number_stops_every_rank(pool: WorkerPool, corpus: Path, tmp_path: Path) -> None:
    more = ("optim.lr=1e30", "optim.warmup_steps=0", "optim.clip_grad_norm=0")
    with pytest.raises(WorkerError, match=r"DivergedError: step 2: .* lower optim.lr \(1e\+30\)") as caught:
        run(pool, tiny_config(corpus, tmp_path, "wild", *more, world_size=2))
    assert len(caught.value.failures) == 2
    assert all("DivergedError" in failure.summary for failure in caught.value.failures)
    kept = read_metrics(tmp_path / "wild")
    assert [sorted({"loss", "grad_norm"} & record.keys()) for record in kept] == [["grad_norm", "loss"], ["loss"]]


def test_a_token_outside_the_vocabulary_stops_every_rank(pool: WorkerPool, corpus: Path, tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "bad", "uint16") as writer:
        writer.append([1] * 999 + [VOCAB_SIZE])
        writer.end_document()
    config = tiny_config(corpus, tmp_path, "bad-run", f"data.train={tmp_path / 'bad'}", world_size=2)
    message = rf"bad\.bin: token 999 has the id {VOCAB_SIZE}, outside a vocabulary of {VOCAB_SIZE}"
    with pytest.raises(WorkerError, match=message) as caught:
        run(pool, config)
    assert len(caught.value.failures) == 2
    assert not (tmp_path / "bad-run").exists()


@pytest.mark.parametrize("layout", ["single", "tp2"])
def test_a_converted_run_is_where_the_next_one_starts(
    pool: WorkerPool, corpus: Path, tmp_path: Path, single: Path, layout: str
) -> None:
    said = convert_model(single, tmp_path / "hf", "float32")
    assert str(corpus / "tokenizer.json") in said
    world_size, overrides = LAYOUTS.get(layout, (1, ()))
    still = ("optim.lr=1e-12", "train.num_steps=1", "optim.warmup_steps=0", f"init.from_hf={tmp_path / 'hf'}")
    run(pool, tiny_config(corpus, tmp_path, "next", *still, *overrides, world_size=world_size))
    (record,) = read_metrics(tmp_path / "next")
    assert record["valid_loss"] == pytest.approx(read_metrics(single)[-1]["valid_loss"], rel=1e-6)


def test_a_tokenizer_named_by_its_folder_is_converted_too(corpus: Path, tmp_path: Path, single: Path) -> None:
    shutil.copytree(single, tmp_path / "run")
    config = tmp_path / "run" / run_files.CONFIG
    named = config.read_text(encoding="utf-8")
    assert f"{corpus}/tokenizer.json" in named
    config.write_text(named.replace(f"{corpus}/tokenizer.json", str(corpus)), encoding="utf-8")
    assert f"with the tokenizer {corpus}/tokenizer.json" in convert_model(tmp_path / "run", tmp_path / "hf", "float32")
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


def test_a_checkpoint_of_another_model_is_refused(pool: WorkerPool, corpus: Path, tmp_path: Path, single: Path) -> None:
    convert_model(single, tmp_path / "hf", "float32")
    more = (f"init.from_hf={tmp_path / 'hf'}", "model.num_layers=3")
    with pytest.raises(WorkerError, match=r"model\.num_layers"):
        run(pool, tiny_config(corpus, tmp_path, "next", *more))
