"""Which model a folder holds, and what to do where it holds none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from megatron_lite.checkpoint.chunks import Chunk, GlobalTensor
from megatron_lite.checkpoint.store import save
from megatron_lite.checkpoint.tensor_files import CheckpointError
from megatron_lite.checkpoint.weights import WEIGHTS
from megatron_lite.config.load import load_config, to_yaml
from megatron_lite.config.schema import ModelConfig
from megatron_lite.inference.source import SourceError, open_source
from megatron_lite.inference.stage import LayoutError, choose_layout, load_stage
from megatron_lite.models.families import parameter_table
from megatron_lite.utils import run_files
from tests.inference import models
from tests.models.tiny import some_values
from tests.utils.meshes import axis, mesh


def write_tokenizer(path: Path, num_words: int = 20, end: str = "<|endoftext|>") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    vocab = {end: 0, **{f"w{id}": id for id in range(1, num_words)}}
    Tokenizer(WordLevel(vocab, unk_token=end)).save(str(path))
    return path


def run_config(tokenizer: Path | None) -> list[str]:
    overrides = [
        "model.family=llama", "model.vocab_size=101", "model.hidden_size=32", "model.num_layers=2", "model.num_heads=4",
        "model.num_kv_heads=2", "model.ffn_hidden_size=48", "model.max_seq_len=32", "train.seq_len=16",
        "train.global_batch_size=8", "train.num_steps=1",
    ]  # fmt: skip
    return overrides + ([] if tokenizer is None else [f"data.tokenizer={tokenizer}"])


def write_run(folder: Path, tokenizer: Path | None) -> Path:
    """The folder of a run as training leaves it: its config, and a checkpoint of ``some_values``."""
    config = load_config(None, run_config(tokenizer))
    folder.mkdir(parents=True)
    (folder / run_files.CONFIG).write_text(to_yaml(config))
    tensors = [
        GlobalTensor(WEIGHTS + spec.name, spec.shape, torch.float32, (Chunk((0,) * len(spec.shape), values),))
        for spec in parameter_table(config.model)
        for values in (some_values(spec, torch.float32),)
    ]
    place = folder / run_files.CHECKPOINTS / "step-00000007"
    save(place, tensors, state={"step": 7}, model=config.model, axis=axis("world"))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs")
    return write_run(place / "tiny", write_tokenizer(place / "data" / "tokenizer.json"))


@pytest.mark.parametrize("inside", ["", "checkpoints", "checkpoints/step-00000007"])
def test_a_run_its_checkpoints_and_one_of_them(run: Path, inside: str) -> None:
    source = open_source(run / inside)
    assert source.model == load_config(run / run_files.CONFIG).model
    assert source.end_ids == (0,) and source.open_tokenizer().get_vocab_size() == 20
    stage = load_stage(source, mesh=mesh(), dtype=torch.float32)
    table = parameter_table(source.model)
    for name, parameter in stage.named_parameters():
        assert torch.equal(parameter, some_values(table[name], torch.float32)), name
        assert not parameter.requires_grad


def test_a_hugging_face_folder(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = models.write_model("mistral", tmp_path / "model")
    source = open_source(folder)
    assert (source.model.family, source.model.sliding_window) == ("mistral", models.WINDOW)
    assert source.tokenizer is None and source.end_ids == (0,)
    with pytest.raises(SourceError, match=r"no tokenizer comes with this model.*--tokenizer.*--token-ids"):
        source.open_tokenizer()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    assert open_source(folder).end_ids == (3, 5)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(CheckpointError, match=r"generation_config.json: eos_token_id is '</s>'"):
        open_source(folder)


def test_the_tokenizer_says_where_a_text_ends_if_nothing_else_does(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = models.write_model("llama", tmp_path / "model")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    assert open_source(folder).end_ids == ()
    write_tokenizer(folder / "tokenizer.json", end="[stop]")
    assert open_source(folder).end_ids == ()
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "w4"}}))
    assert open_source(folder).end_ids == (4,)


def test_another_tokenizer_can_be_named(run: Path, tmp_path: Path) -> None:
    other = write_tokenizer(tmp_path / "tokenizer.json", 30)
    assert open_source(run, tmp_path).open_tokenizer().get_vocab_size() == 30
    assert open_source(run, other).tokenizer == other
    with pytest.raises(SourceError, match=r"--tokenizer .*nowhere"):
        open_source(run, tmp_path / "nowhere")


def test_a_prompt_is_not_cut_or_filled_by_what_the_tokenizer_was_saved_with(run: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(write_tokenizer(tmp_path / "tokenizer.json")))
    tokenizer.enable_truncation(1)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(tokenizer.encode("w5").ids) == 8, "it would be"
    assert open_source(run, tmp_path).open_tokenizer().encode("w5").ids == [5]


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(run: Path, tmp_path: Path) -> None:
    large = write_tokenizer(tmp_path / "tokenizer.json", 102)
    with pytest.raises(SourceError, match=r"has 102 tokens, and the model .* only 101"):
        open_source(run, large).open_tokenizer()
    write_tokenizer(tmp_path / "tokenizer.json", 101)
    open_source(run, large).open_tokenizer()


def test_a_run_without_its_tokenizer_says_what_to_do(run: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(run, tmp_path / "moved")
    config = (moved / run_files.CONFIG).read_text()
    (moved / run_files.CONFIG).write_text(config.replace("data/tokenizer.json", "data/gone.json"))
    source = open_source(moved)
    assert source.tokenizer is None and source.end_ids == ()
    with pytest.raises(SourceError, match="what the config of its run names; name one with --tokenizer"):
        source.open_tokenizer()


def test_folders_without_a_model_are_described(tmp_path: Path) -> None:
    possible = "Name the folder of a run.*of one of its checkpoints.*or of a Hugging Face model"
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("a")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "model.safetensors").write_text("")
    for name, found in (
        ("missing", "there is no such folder"),
        ("empty", "is empty"),
        ("notes", "has no model in it, only a.txt"),
        ("notes/a.txt", "is a file, not a folder"),
        ("bare", "has safetensors, but no config.json"),
    ):
        with pytest.raises(SourceError, match=f"{name}: {found}.*{possible}"):
            open_source(tmp_path / name)


def test_a_run_without_a_checkpoint(run: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(run / run_files.CONFIG, tmp_path / "run")
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        open_source(tmp_path / "run")


@pytest.mark.parametrize(
    ("tp", "pp", "world_size", "words"),
    [
        (3, 1, 3, r"--tp 3: .* 4 heads, 2 key-value heads .* can be sliced over 1, 2, 4"),
        (1, 3, 3, r"--pp 3: the 2 layers of this model fill 1 to 2 stages"),
        (2, 2, 6, r"need 4 processes, or a multiple of it, and 6 processes were started: use --nproc 4"),
        (2, 1, 1, r"1 process was started"),
    ],
)
def test_layouts_that_do_not_fit(tp: int, pp: int, world_size: int, words: str) -> None:
    model: ModelConfig = load_config(None, run_config(None)).model
    with pytest.raises(LayoutError, match=words):
        choose_layout(model, tp=tp, pp=pp, world_size=world_size)
    assert choose_layout(model, tp=2, pp=2, world_size=8).dp == 2
