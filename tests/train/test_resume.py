"""A run that was cut off goes on as if nothing had been: the same numbers in every bit, or a refusal that says why."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_lite.config import RunConfig
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.worker_pool import WorkerError, WorkerPool
from megatron_lite.train import loop
from megatron_lite.train.build import layout_of
from megatron_lite.train.loop import TrainResult, train
from megatron_lite.utils import run_files
from tests.train.tiny_run import NUM_STEPS, read_metrics, same_numbers, tiny_config

EVERY_3 = ("checkpoint.interval=3", "checkpoint.keep_last=9")
LAYOUTS = {"single": (1, ()), "tp2-pp2-dp2": (8, ("parallel.tp=2", "parallel.pp=2"))}


class CutOff(Exception):
    """Stands in for whatever ends a run in the middle."""


def job(
    config: RunConfig, cut_off_at: int = 0, resume: str = "auto", overwrite: bool = False, forgets: str = ""
) -> tuple[TrainResult | None, str]:
    """A run that ends in the middle of a step, or runs to its end, and what it printed.

    forgets: what is left out of the state that is given back.
    """
    mesh = build_mesh(layout_of(config), device=torch.device("cpu"))
    take_step, restore = loop.train_step, loop.restore

    def cut_off(training, microbatches):  # type: ignore[no-untyped-def]
        if training.num_steps + 1 == cut_off_at:
            raise CutOff
        return take_step(training, microbatches)

    def forgetful(training, manifest):  # type: ignore[no-untyped-def]
        position = restore(training, manifest)
        for state in training.optimizer_states.values():
            if forgets == "moments":
                state.tensors["first"].zero_()
        return dataclasses.replace(position, **{forgets: 0}) if forgets in ("samples", "tokens") else position

    loop.train_step, loop.restore = cut_off, forgetful
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return train(config, mesh=mesh, resume=resume, overwrite=overwrite), said.getvalue()
    except CutOff:
        return None, said.getvalue()
    finally:
        loop.train_step, loop.restore = take_step, restore


def run(pool: WorkerPool, config: RunConfig, *args: object, **kwargs: object) -> str:
    """What the first rank said."""
    return pool.run(job, config.world_size, config, *args, timeout_s=120, **kwargs)[0][1]


@pytest.fixture(scope="module")
def undisturbed(pool: WorkerPool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("undisturbed")
    for name, (world_size, layout) in LAYOUTS.items():
        run(pool, tiny_config(corpus, folder, name, *layout, world_size=world_size))
    return {name: folder / name for name in LAYOUTS}


@pytest.fixture(scope="module")
def cut_off(pool: WorkerPool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in one process with checkpoints of steps 3 and 6, cut off in step 9. Not to be changed."""
    config = tiny_config(corpus, tmp_path_factory.mktemp("runs"), "cut-off", *EVERY_3)
    run(pool, config, 9)
    return Path(config.run.dir) / "cut-off"


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / folder.name))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_bitwise(
    pool: WorkerPool, corpus: Path, tmp_path: Path, undisturbed: dict[str, Path], layout: str, asynchronous: str
) -> None:
    """Cut off twice: after a checkpoint and some steps, and before the second run has written one."""
    world_size, more = LAYOUTS[layout]
    more = (*more, *EVERY_3, f"checkpoint.asynchronous={asynchronous}")
    config = tiny_config(corpus, tmp_path, "again", *more, world_size=world_size)
    run(pool, config, 6)
    assert "going on from" in run(pool, config, 8) and len(read_metrics(tmp_path / "again")) == 7
    said = run(pool, config)
    assert "step-00000006, after step 6\n" in said and "changed since" not in said
    assert same_numbers(tmp_path / "again", undisturbed[layout]) == []


@pytest.mark.parametrize("forgets", ["moments", "samples", "tokens"])
def test_what_is_forgotten_shows(
    pool: WorkerPool, corpus: Path, tmp_path: Path, undisturbed: dict[str, Path], cut_off: Path, forgets: str
) -> None:
    """Negative control: the comparison sees it, from the first step on (the moments: from the second)."""
    folder = copy_of(cut_off, tmp_path)
    run(pool, tiny_config(corpus, tmp_path, "cut-off", *EVERY_3), forgets=forgets)
    differing = same_numbers(folder, undisturbed["single"])
    assert differing[0] == {"moments": "grad_norm of step 8", "samples": "grad_norm of step 7"}.get(
        forgets, "tokens of step 7"
    )


def test_another_layout_batch_and_micro_batch_go_on_with_the_next_samples(
    pool: WorkerPool, corpus: Path, tmp_path: Path, undisturbed: dict[str, Path], cut_off: Path
) -> None:
    """Two steps of 8 samples are then one of 16: its loss is their mean, but for the weights in between."""
    folder = copy_of(cut_off, tmp_path)
    still = ("optim.lr=1e-12", "optim.min_lr=0", "train.num_steps=7", "optim.warmup_steps=0", "parallel.tp=2")
    more = (*still, *EVERY_3, "train.global_batch_size=16", "train.micro_batch_size=4")
    said = run(pool, tiny_config(corpus, tmp_path, "cut-off", *more, world_size=4))
    (changed,) = [line for line in said.splitlines() if line.startswith("changed since then: ")]
    for part in ("train.micro_batch_size 2 -> 4", "train.global_batch_size 8 -> 16", "optim.lr 0.01 -> 1e-12"):
        assert part in changed, changed
    assert "parallel.tp" not in changed and "train.num_steps" not in changed, "they change no number"
    large = read_metrics(folder)[-1]
    assert (large["step"], large["tokens"]) == (7, read_metrics(undisturbed["single"])[7]["tokens"])
    checkpoint = json.loads((folder / "checkpoints" / "step-00000007" / "checkpoint.json").read_text())
    assert checkpoint["state"]["position"] == {"step": 7, "samples": 64, "tokens": large["tokens"]}

    other = copy_of(cut_off, tmp_path / "small")
    more = ("optim.lr=1e-12", "optim.min_lr=0", "train.num_steps=8", "optim.warmup_steps=0", *EVERY_3)
    run(pool, tiny_config(corpus, tmp_path / "small", "cut-off", *more))
    small = read_metrics(other)[6:]
    assert len(small) == 2 and small[0]["loss"] != pytest.approx(small[1]["loss"], rel=1e-4)
    assert large["loss"] == pytest.approx(sum(record["loss"] for record in small) / 2, rel=1e-5)


def test_a_damaged_checkpoint_is_skipped_named_and_put_aside(
    pool: WorkerPool, corpus: Path, tmp_path: Path, undisturbed: dict[str, Path], cut_off: Path
) -> None:
    folder = copy_of(cut_off, tmp_path)
    damaged = folder / "checkpoints" / "step-00000006" / "rank-00000.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    said = run(pool, tiny_config(corpus, tmp_path, "cut-off", *EVERY_3))
    assert f"warning: skipped step-00000006: {damaged}: is damaged" in said
    assert "step-00000003, after step 3\n" in said
    names = sorted(path.name for path in damaged.parent.parent.iterdir())
    assert names == [f"step-{step:08d}{end}" for step, end in ((3, ""), (6, ""), (6, ".damaged"), (9, ""), (12, ""))]
    assert same_numbers(folder, undisturbed["single"]) == []

    for path in damaged.parent.parent.glob("*/*.safetensors"):
        path.unlink()
    with pytest.raises(WorkerError, match=r"none of its checkpoints is whole; copy one.*--resume PATH.*--overwrite"):
        run(pool, tiny_config(corpus, tmp_path, "cut-off", "train.num_steps=20"))
    assert same_numbers(folder, undisturbed["single"]) == [], "nothing has been touched"


def test_another_run_goes_on_from_it(
    pool: WorkerPool, corpus: Path, tmp_path: Path, undisturbed: dict[str, Path], cut_off: Path
) -> None:
    """--resume PATH: the state goes over, the metrics begin with the first step that the run takes."""
    config = tiny_config(corpus, tmp_path, "heir", *EVERY_3)
    before = sorted(cut_off.rglob("*"))
    run(pool, config, resume=str(cut_off / "checkpoints" / "step-00000003"))
    records = read_metrics(tmp_path / "heir")
    assert [record["step"] for record in records] == list(range(4, NUM_STEPS + 1))
    assert records[-1]["loss"] == read_metrics(undisturbed["single"])[-1]["loss"]
    assert sorted(cut_off.rglob("*")) == before
    with pytest.raises(WorkerError, match=r"heir: holds a run already.*go on with it by --resume auto"):
        run(pool, config, resume=str(cut_off))


REFUSED = {
    "another model": (("model.num_layers=3",), r"model\.num_layers was 2 and is 3. \d+ parameters differ: layers\.2\."),
    "other shapes": (("model.ffn_hidden_size=64",), r"layers\.0\.mlp\.up\.weight is \[\d+, 32\] there and \[128, 32\]"),
    "other heads": (("model.num_kv_heads=4",), r"model\.num_kv_heads was 2 and is 4"),
    "another seed": (("train.seed=7",), r"train\.seed was 1234 and is 7\. .*if the change is intended"),
    "other data": (("data.shuffle=false",), r"data\.shuffle was true and is false"),
    "another constant": (("model.norm_eps=1e-3",), r"model\.norm_eps was \S+ and is 0\.001"),
    "a shorter run": (("train.num_steps=6",), r"holds a run already, which has taken its 6 steps; raise train\.num"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_run_is_refused_on_every_rank(
    pool: WorkerPool, corpus: Path, tmp_path: Path, cut_off: Path, case: str
) -> None:
    more, message = REFUSED[case]
    folder = copy_of(cut_off, tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(WorkerError, match=message) as caught:
        run(pool, tiny_config(corpus, tmp_path, "cut-off", *EVERY_3, *more, world_size=2))
    assert len(caught.value.failures) == 2
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_other_data_under_the_same_name_are_refused(pool: WorkerPool, corpus: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(corpus, tmp_path / "corpus")
    run(pool, tiny_config(moved, tmp_path, "named", *EVERY_3, "train.num_steps=4"))
    path = moved / "train.bin"
    content = bytearray(path.read_bytes())
    path.write_bytes(content)
    run(pool, tiny_config(moved, tmp_path, "named", *EVERY_3, "train.num_steps=5"))  # a copy is the same data
    content[0] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        WorkerError, match=rf"{path} had [\d,]+ bytes and is another file now.*if the change is intended"
    ):
        run(pool, tiny_config(moved, tmp_path, "named", *EVERY_3, "train.num_steps=6"))


def test_an_intended_change_is_a_warning(pool: WorkerPool, corpus: Path, tmp_path: Path, cut_off: Path) -> None:
    folder = copy_of(cut_off, tmp_path)
    config = tiny_config(corpus, tmp_path, "cut-off", *EVERY_3, "train.seed=7", "optim.lr=1e-3")
    said = run(pool, config, resume=str(folder))
    assert "train.seed was 1234 and is 7; the run goes on from sample 48" in said
    assert len(read_metrics(folder)) == NUM_STEPS
    assert run(pool, tiny_config(corpus, tmp_path, "cut-off", "train.seed=7", "train.num_steps=14")).count("step 13/14")


def test_overwrite_begins_anew(pool: WorkerPool, corpus: Path, tmp_path: Path, cut_off: Path) -> None:
    folder = copy_of(cut_off, tmp_path)
    config = tiny_config(corpus, tmp_path, "cut-off", "train.num_steps=2", "optim.warmup_steps=1")
    with pytest.raises(WorkerError, match="add --overwrite"):
        run(pool, config, resume="none")
    assert "going on" not in run(pool, config, overwrite=True)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]


def test_keep_every(pool: WorkerPool, corpus: Path, tmp_path: Path) -> None:
    more = ("checkpoint.interval=2", "checkpoint.keep_every=6", "checkpoint.keep_last=1", "checkpoint.save_last=false")
    run(pool, tiny_config(corpus, tmp_path, "kept", *more, "train.num_steps=11"))
    assert sorted(path.name for path in (tmp_path / "kept" / "checkpoints").iterdir()) == [
        "step-00000006", "step-00000010",
    ]  # fmt: skip


def test_tensorboard_and_wandb_are_continued(pool: WorkerPool, corpus: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("wandb")
    more = (*EVERY_3, "run.tensorboard=true", "run.wandb=offline")
    config = tiny_config(corpus, tmp_path, "told", *more)
    run(pool, config, 6)
    run(pool, config)
    folder = tmp_path / "told"
    events = accumulator.EventAccumulator(str(folder / run_files.TENSORBOARD)).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, NUM_STEPS + 1))
    ids = {path.name.rpartition("-")[2] for path in (folder / run_files.WANDB).glob("offline-run-*")}
    assert len(ids) == 1, "one run to wandb"
