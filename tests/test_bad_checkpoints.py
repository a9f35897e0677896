"""Models on disk that cannot be used, and output folders that must not be replaced: one message each, nothing lost."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from typer.testing import CliRunner

from megatron_lite.cli import app
from tests.test_bad_input import config_file, said
from tests.train.tiny_run import VERSE, make_corpus

SHARD, MANIFEST, WEIGHTS = "rank-00000.safetensors", "checkpoint.json", "model.safetensors"
STEPS = (1, 2)


class Trap:
    """A pickle of it makes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self._mark),)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/, tiny.yaml, runs/tiny with checkpoints of its two steps, hf/ with the exported model."""
    folder = tmp_path_factory.mktemp("place")
    config = config_file(folder, make_corpus(folder))
    steps = ["train.num_steps=2", "optim.warmup_steps=0", "checkpoint.interval=1"]
    for arguments in (["train", config, *steps], ["convert", folder / "runs" / "tiny", folder / "hf"]):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def run(place: Path, tmp_path: Path) -> Path:
    """A copy of the run to break."""
    return Path(shutil.copytree(place / "runs" / "tiny", tmp_path / "runs" / "tiny"))


@pytest.fixture
def export(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / "hf", tmp_path / "hf"))


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step-{number:08d}"


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-50] ^= 1
    file.write_bytes(content)


def pickled(file: Path) -> None:
    file.write_bytes(pickle.dumps(Trap(file.parent.parent / "trapped")))


# what happens to a file of a checkpoint -> the file, and what the message has to say beside its name
DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-100]), SHARD, "was written with"),
    "missing": (lambda file: file.unlink(), SHARD, "is missing"),
    "extra": (lambda file: shutil.copy(file, file.with_name("rank-00001.safetensors")), SHARD, "does not belong"),
    "damaged": (flip_a_bit, SHARD, "do not match their checksum"),
    "a pickle": (pickled, SHARD, "is a pickle"),
    "a pickle as manifest": (pickled, MANIFEST, "is a pickle"),
}  # fmt: skip


@pytest.mark.parametrize("command", ["eval", "generate", "convert"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint(run: Path, place: Path, tmp_path: Path, damage: str, command: str) -> None:
    """Named by itself it is refused, with the file; nothing is executed, and nothing written."""
    break_it, name, reason = DAMAGE[damage]
    newest = step(run, STEPS[-1])
    break_it(newest / name)
    arguments = {
        "eval": [place / "data" / "valid"],
        "generate": ["--prompt", "the cats", "--max-new-tokens", 2],
        "convert": [tmp_path / "out"],
    }
    message = said(command, newest, *arguments[command])
    assert reason in message and message.count("\n") == 1
    assert str(newest / ("rank-00001.safetensors" if damage == "extra" else name)) in message
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("trapped")), "the pickle was opened"


def test_the_trap_is_one(tmp_path: Path) -> None:
    """Negative control: the pickle does make a file where it is read."""
    (tmp_path / "step").mkdir()
    pickled(tmp_path / "step" / SHARD)
    pickle.loads((tmp_path / "step" / SHARD).read_bytes())
    assert (tmp_path / "trapped").exists()


def test_a_run_whose_newest_checkpoint_is_damaged(run: Path, place: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The one before is used, with a warning that names the file; without any, all that is wrong is told."""
    command = ["eval", str(run), str(place / "data" / "valid")]
    DAMAGE["truncated"][0](step(run, 2) / SHARD)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("megatron_lite")]
    assert len(warnings) == 1 and str(step(run, 2) / SHARD) in warnings[0]
    DAMAGE["missing"][0](step(run, 1) / SHARD)
    message = said(*command)
    assert "none of its 2 checkpoints is whole" in message
    assert str(step(run, 1) / SHARD) in message and str(step(run, 2) / SHARD) in message


def not_a_number(file: Path) -> None:
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = torch.nan
    save_file(tensors, file, {"format": "pt"})


EXPORT_DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "truncated": (DAMAGE["truncated"][0], [WEIGHTS, "is truncated"]),
    "missing": (DAMAGE["missing"][0], [WEIGHTS, "download"]),
    "a pickle": (pickled, [WEIGHTS, "is a pickle"]),
    "only a pickle": (lambda file: file.rename(file.with_name("pytorch_model.bin")), ["pytorch_model.bin", "pickles"]),
    "NaN": (not_a_number, ["model.layers.1.mlp.down_proj.weight", "NaN", "use an earlier one"]),
}


@pytest.mark.parametrize("damage", EXPORT_DAMAGE)
def test_a_damaged_huggingface_folder(export: Path, place: Path, tmp_path: Path, damage: str) -> None:
    break_it, parts = EXPORT_DAMAGE[damage]
    break_it(export / WEIGHTS)
    for arguments in (
        ["eval", export, place / "data" / "valid"],
        ["generate", export, "--prompt", "the cats"],
        ["train", place / "tiny.yaml", f"init.from_hf={export}", f"run.dir={tmp_path / 'more'}"],
    ):
        message = said(*arguments)
        assert all(part in message for part in parts), message
    assert not list(tmp_path.rglob("trapped")), "the pickle was opened"


def test_a_checkpoint_of_another_model(run: Path, place: Path, tmp_path: Path) -> None:
    other = ["model.num_layers=3", "model.ffn_hidden_size=64", "train.num_steps=4"]
    message = said("train", place / "tiny.yaml", *other, "--resume", run, f"run.dir={tmp_path / 'more'}")
    assert "is a checkpoint of another model" in message and "model.num_layers was 2 and is 3" in message
    assert "layers.0.mlp.up.weight is [256, 32] there and [128, 32] here" in message
    assert "layers.2.attention.qkv.weight is only here" in message
    assert not (tmp_path / "more" / "tiny" / "metrics.jsonl").exists()


def test_a_tokenizer_larger_than_the_model(run: Path, place: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(place / "data" / "tokenizer.json"))
    tokenizer.add_tokens([f"<more-{n}>" for n in range(9)])
    tokenizer.save(str(tmp_path / "larger.json"))
    more = ["--tokenizer", tmp_path / "larger.json"]
    for arguments in (
        ["eval", run, place / "data" / "valid", *more],
        ["generate", run, "--prompt", "the cats", *more],
        ["convert", run, tmp_path / "out", *more],
    ):
        message = said(*arguments)
        assert "larger.json: has 309 tokens" in message and "only 300" in message
    assert not (tmp_path / "out").exists()


def test_output_folders_that_exist_are_kept(run: Path, place: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(VERSE[::-1], encoding="utf-8")
    kept = tmp_path / "data"
    shutil.copytree(place / "data", kept)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "note.txt").write_text("mine")
    before = {path: path.read_bytes() for folder in (kept, run, taken) for path in folder.rglob("*") if path.is_file()}
    assert "holds another corpus" in said("data", other, "--out", kept)
    assert "holds a run already" in said("train", place / "tiny.yaml", "--resume", "none", f"run.dir={run.parent}")
    assert "is not empty, it has note.txt" in said("convert", run, taken)
    after = {path: path.read_bytes() for folder in (kept, run, taken) for path in folder.rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize("command", ["data", "train", "convert", "eval"])
def test_output_that_cannot_be_written(run: Path, place: Path, tmp_path: Path, command: str) -> None:
    """A file where a folder would have to be: the same for every user, also for root."""
    wall = tmp_path / "wall"
    wall.touch()
    arguments = {
        "data": [place / "verse.txt", "--out", wall / "data"],
        "train": [place / "tiny.yaml", f"run.dir={wall}"],
        "convert": [run, wall / "out"],
    }
    if command == "eval":
        result = CliRunner().invoke(app, ["eval", str(run), "--json", str(wall / "scores.json")])
        assert result.exit_code == 2 and result.stderr.startswith("error: ") and str(wall) in result.stderr
        return
    message = said(command, *arguments[command])
    assert str(wall) in message and "cannot be written" in message and "choose" in message
