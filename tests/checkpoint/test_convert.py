"""megatron-lite convert: checkpoints and Hugging Face folders in, Hugging Face folders and model sections out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from megatron_lite.checkpoint.chunks import Chunk, GlobalTensor
from megatron_lite.checkpoint.convert import convert_model
from megatron_lite.checkpoint.huggingface import config_from_hf, huggingface_weights, read_model
from megatron_lite.checkpoint.huggingface.check import SAMPLE_TEXT
from megatron_lite.checkpoint.store import save
from megatron_lite.checkpoint.tensor_files import CheckpointError
from megatron_lite.cli import app
from megatron_lite.config import load_config, to_yaml
from megatron_lite.data.tokenizer import save_tokenizer
from megatron_lite.data.tokenizer_training import train_tokenizer
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.topology import Layout
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.models.families import parameter_table
from megatron_lite.utils.files import DataError

Original = Callable[[str], Path]
KEYS = ["train.seq_len=8", "train.global_batch_size=8", "train.num_steps=1"]


def checkpoint_job(source: Path, folder: Path, first_weight: float | None) -> None:
    """A checkpoint of the weights in a Hugging Face folder."""
    model = read_model(source)
    table, tensors = parameter_table(model), []
    weights = huggingface_weights(source, table, model, torch.float32)
    for spec in table:
        if spec.tied_to is None:
            whole = weights(spec, 1, 0)
            if first_weight is not None and spec.name == "final_norm.weight":
                whole[0] = first_weight
            chunk = Chunk((0,) * whole.dim(), whole)
            tensors.append(GlobalTensor(f"weights/{spec.name}", spec.shape, torch.float32, (chunk,)))
    mesh = build_mesh(Layout(pp=1, dp=1, cp=1, tp=1), device=torch.device("cpu"))
    save(folder, tensors, state={}, model=model, axis=mesh.world)


def run_of(
    pool: WorkerPool, source: Path, folder: Path, *keys: str, step: int = 3, first_weight: float | None = None
) -> Path:
    """The folder of a run that has come to ``step``."""
    section = folder.with_suffix(".yaml")
    section.unlink(missing_ok=True)
    convert_model(source, section, "float32")
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(load_config(None, [f"model={section}", *KEYS, *keys])))
    pool.run(checkpoint_job, 1, source, folder / "checkpoints" / f"step-{step:08d}", first_weight)
    return folder


def tokenizer_folder(folder: Path, vocab_size: int = 257) -> Path:
    """As a Hugging Face folder has it: with a chat template, special tokens, and two tokens that end a text."""
    folder.mkdir()
    save_tokenizer(train_tokenizer(["one two three"], vocab_size), folder / "tokenizer.json")
    texts = {
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": {"content": "a"}},
        "special_tokens_map.json": {"eos_token": "a", "pad_token": "b"},
        "generation_config.json": {"eos_token_id": [3, 7], "temperature": 0.6, "do_sample": True},
    }
    for name, value in texts.items():
        (folder / name).write_text(json.dumps(value))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Path]:
    """A Hugging Face folder whose vocabulary holds the smallest tokenizer."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.Qwen2Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=[3, 7],
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tokenizer_folder(tmp_path / "large"))
    (tmp_path / "large/generation_config.json").write_text('{"eos_token_id": [3, 7], "temperature": 0.6}')
    yield tmp_path / "large"


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2-window", "gpt2-untied"])
def test_a_model_section_trains_from_its_folder(original: Original, name: str, tmp_path: Path) -> None:
    source, out = original(name), tmp_path / "model.yaml"
    said = convert_model(source, out, "float32")
    assert f"train it with model={out} init.from_hf={source}" in said
    config = load_config(None, [f"model={out}", *KEYS])
    assert config.model.model_dump() == config_from_hf(source)
    assert yaml.safe_load(out.read_text())["family"] == name.partition("-")[0]
    with pytest.raises(CheckpointError, match=r"model\.yaml: is there already"):
        convert_model(source, out, "float32")


def test_a_run_becomes_a_folder_and_a_model_section(pool: WorkerPool, original: Original, tmp_path: Path) -> None:
    source = original("mistral")
    run = run_of(pool, source, tmp_path / "run", step=2)
    run_of(pool, source, run, step=10, first_weight=0.5)
    expected = load_file(source / "model.safetensors")
    for given, first in ((run, 0.5), (run / "checkpoints", 0.5), (run / "checkpoints/step-00000002", None)):
        out = tmp_path / given.name / "hf"
        assert "without a tokenizer" in convert_model(given, out, "float32")
        found = load_file(out / "model.safetensors")
        assert found.keys() == expected.keys()
        if first is not None:
            assert found["model.norm.weight"][0] == first
            found["model.norm.weight"][0] = expected["model.norm.weight"][0]
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        shutil.rmtree(out)
    said = convert_model(run, tmp_path / "again.yaml", "float32")
    assert said.endswith(f"train it with model={tmp_path / 'again.yaml'}")
    assert load_config(None, [f"model={tmp_path / 'again.yaml'}", *KEYS]).model == read_model(source)


def test_weights_that_are_nan_are_not_converted(editable: Callable[[str], Any], tmp_path: Path) -> None:
    copy = editable("mistral")
    copy.tensors["model.norm.weight"][5] = float("nan")
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"1 of 32 weights of model\.norm\.weight are NaN"):
        convert_model(copy.save(), tmp_path / "out" / "hf", "bfloat16")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_tokenizer_of_hugging_face_keeps_all_its_files(large: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    said = convert_model(large, tmp_path / "out", "bfloat16")
    assert f"with the tokenizer {large}/tokenizer.json" in said and "transformers computes the same logits" in said
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (large / name).read_bytes(), name
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["eos_token_id"] == [3, 7] and written["torch_dtype"] == "bfloat16"
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["temperature"] == 0.6
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.generation_config.eos_token_id == [3, 7]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "a"


def test_a_run_that_began_from_a_folder_carries_its_tokenizer_on(pool: WorkerPool, large: Path, tmp_path: Path) -> None:
    run = run_of(pool, large, tmp_path / "run", f"init.from_hf={large}")
    assert f"with the tokenizer {large}/tokenizer.json" in convert_model(run, tmp_path / "out", "float32")
    assert (tmp_path / "out/chat_template.jinja").is_file()
    # its own data.tokenizer comes first
    other = tokenizer_folder(tmp_path / "other", 260)
    run_of(pool, large, run, f"init.from_hf={large}", f"data.tokenizer={other}", step=4)
    assert f"with the tokenizer {other}/tokenizer.json" in convert_model(run, tmp_path / "two", "float32")
    # and what is named comes before that; one that is gone is no reason to stop
    (tmp_path / "plain").mkdir()
    save_tokenizer(train_tokenizer(["one two three"], 257), tmp_path / "plain/tokenizer.json")
    assert f"with the tokenizer {tmp_path}/plain" in convert_model(
        run, tmp_path / "three", "float32", tokenizer=tmp_path / "plain"
    )
    assert json.loads((tmp_path / "three/special_tokens_map.json").read_text())["eos_token"] == "<|endoftext|>"
    shutil.rmtree(other)
    shutil.rmtree(large)
    assert "without a tokenizer" in convert_model(run, tmp_path / "four", "float32")


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_tokenizers_of_every_kind_load_in_transformers(large: Path, tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = train_tokenizer(["one two three"] * 9 + ["two three four"] * 9, 280, kind)  # type: ignore[arg-type]
    (tmp_path / "made").mkdir()
    save_tokenizer(tokenizer, tmp_path / "made/tokenizer.json")
    said = convert_model(large, tmp_path / "out", "float32", tokenizer=tmp_path / "made")
    loaded = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert loaded(SAMPLE_TEXT)["input_ids"] == tokenizer.encode(SAMPLE_TEXT).ids
    assert loaded.eos_token_id == json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == 0
    # For a qwen2 model AutoTokenizer of transformers 5 takes Qwen's rules; what it would misread is said.
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(SAMPLE_TEXT)["input_ids"]
    is_misread = read != tokenizer.encode(SAMPLE_TEXT).ids
    assert ("load it with PreTrainedTokenizerFast.from_pretrained" in said) == is_misread
    assert is_misread or transformers.__version__ < "5"


def test_the_command(large: Path, tmp_path: Path) -> None:
    def said(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
        return result.exit_code, result.stderr + result.stdout

    code, text = said(large, tmp_path / "out", "--no-check")
    assert (code, "not checked against transformers" in text) == (0, True)
    code, text = said(large, tmp_path / "out")
    assert (code, "is not empty, it has" in text) == (2, True)
    code, text = said(tmp_path / "nowhere", tmp_path / "more")
    assert (code, "has no checkpoint" in text) == (2, True)
    code, text = said(tmp_path, tmp_path / "more.yaml")
    assert (code, "has no checkpoint" in text) == (2, True)
    (large / "tokenizer.json").write_text("{")
    code, text = said(large, tmp_path / "more")
    assert (code, "is not a tokenizer" in text) == (2, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "out"]


def test_a_broken_tokenizer_config(large: Path, tmp_path: Path) -> None:
    (large / "tokenizer_config.json").write_text("[]")
    with pytest.raises((CheckpointError, DataError), match=r"tokenizer_config\.json"):
        convert_model(large, tmp_path / "out", "float32")
    assert not (tmp_path / "out").exists()
