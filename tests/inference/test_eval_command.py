"""`megatron-lite eval` as a user runs it: what it prints and writes, and what it says of what cannot be evaluated."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from typer.testing import CliRunner

from megatron_lite.cli import app
from megatron_lite.config.load import to_yaml
from megatron_lite.data import IndexedWriter
from megatron_lite.data.prepare import read_summary
from tests.inference.tiny_models import VERSE, make_folder
from tests.train.tiny_run import make_corpus, tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return make_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "verse.txt"
    path.write_text(VERSE, encoding="utf-8")
    return path


def said(*args: object) -> str:
    """What a command that must fail says: one message on stderr, nothing on stdout, exit code 2."""
    result = CliRunner().invoke(app, ["eval", *map(str, args)])
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert result.stdout == ""
    return result.stderr


def changed_copy(folder: Path, out: Path, name: str, value: float) -> Path:
    """The model with one weight filled with ``value``."""
    out.mkdir()
    for file in ("config.json", "tokenizer.json"):
        (out / file).write_text((folder / file).read_text())
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = torch.full_like(tensors[name], value)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def test_table_and_json(folder: Path, text: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["eval", str(folder), str(text), "--json", str(tmp_path / "scores.json")])
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "scores.json").read_text())
    (score,) = written["scores"]
    assert written["seq_len"] == written["stride"] == 64 and not written["isolate_documents"]
    head, row = result.stdout.strip().splitlines()
    assert head.split() == ["text", "loss", "perplexity", "bits/byte", "tokens", "bytes"]
    name, loss, _, bits, tokens, size = row.split()
    assert name == score["name"] == str(text)
    assert float(loss) == pytest.approx(score["loss"], abs=5e-5)
    assert float(bits) == pytest.approx(score["bits_per_byte"], abs=5e-5)
    assert int(tokens.replace(",", "")) == score["num_scored"] > 400
    assert int(size.replace(",", "")) == score["text_bytes"] == len(VERSE)


@pytest.mark.slow
def test_processes_are_started(folder: Path, text: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_lite", "eval", str(folder), str(text), "--json"]
    layouts = {"one": [], "four": ["--tp", "2", "--pp", "2", "--nproc", "4"]}
    losses = {}
    for name, layout in layouts.items():
        done = subprocess.run([*command, str(tmp_path / name), *layout], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        losses[name] = json.loads((tmp_path / name).read_text())["scores"][0]["loss"]
    assert losses["four"] == pytest.approx(losses["one"], rel=1e-5)


def test_models_that_cannot_be_evaluated(folder: Path, text: Path, tmp_path: Path) -> None:
    assert "there is no such folder" in said(tmp_path / "nowhere", text)
    assert "no config of a run with data.valid" in said(folder)
    for value in (float("nan"), float("inf")):
        broken = changed_copy(folder, tmp_path / str(value), "model.layers.1.mlp.down_proj.weight", value)
        assert "NaN or infinite" in said(broken, text)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"<more-{n}>" for n in range(50)])
    tokenizer.save(str(tmp_path / "larger.json"))
    message = said(folder, text, "--tokenizer", tmp_path / "larger.json")
    assert "larger.json: has 350 tokens" in message and "only 320" in message


def test_texts_that_cannot_be_evaluated(folder: Path, tmp_path: Path) -> None:
    assert "no such file" in said(folder, tmp_path / "nowhere.txt")
    assert "is a folder" in said(folder, tmp_path)
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert "empty.txt: has 0 tokens and none that can be scored" in said(folder, empty)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 and more")
    assert "latin.txt: is not UTF-8: bad byte at offset 3" in said(folder, tmp_path / "latin.txt")
    (tmp_path / "lines.jsonl").write_text('{"text": "the cats"}\n{"body": "sit"}\n')
    assert "lines.jsonl:2" in said(folder, tmp_path / "lines.jsonl")
    with IndexedWriter(tmp_path / "pair", "uint16") as writer:
        writer.add_document([1, 2, 3, 999])
    message = said(folder, tmp_path / "pair")
    assert "pair.bin: token 3 has the id 999" in message and "320" in message


def test_options_that_make_no_sense(folder: Path, text: Path, tmp_path: Path) -> None:
    assert "--seq-len is 65" in said(folder, text, "--seq-len", 65)
    assert "--stride is 33" in said(folder, text, "--seq-len", 32, "--stride", 33)
    assert "--stride is 0" in said(folder, text, "--stride", 0)
    assert "--batch-size is 0" in said(folder, text, "--batch-size", 0)
    assert "--tp 3" in said(folder, text, "--tp", 3, "--nproc", 3)
    assert "--pp 9" in said(folder, text, "--pp", 9, "--nproc", 9)
    assert "use --nproc 4" in said(folder, text, "--tp", 2, "--pp", 2, "--nproc", 2)
    assert "--nproc is 0" in said(folder, text, "--nproc", 0)
    assert "nowhere" in said(folder, text, "--tokenizer", tmp_path / "nowhere")
    assert "leave one of them out" in said(folder, text, "--tasks", "a")
    assert "names no task" in said(folder, "--tasks", "a,,b")
    assert "--limit is 0" in said(folder, "--tasks", "a", "--limit", 0)


def test_tasks_need_the_harness(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'megatron-lite[lm-eval]'" in said(folder, "--tasks", "hellaswag")


def test_a_result_that_cannot_be_written(folder: Path, text: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["eval", str(folder), str(text), "--json", str(text / "scores.json")])
    assert result.exit_code == 2 and "cannot be written" in result.stderr
    assert not list(tmp_path.iterdir())


def scores_of(*args: object, json_file: Path) -> list[dict[str, object]]:
    result = CliRunner().invoke(app, ["eval", *map(str, args), "--json", str(json_file)])
    assert result.exit_code == 0, result.output
    return list(json.loads(json_file.read_text())["scores"])


@pytest.mark.slow
def test_a_run_its_checkpoint_and_its_export(tmp_path: Path) -> None:
    """All three are one model, and the data are those that the run held out."""
    corpus = make_corpus(tmp_path)
    config = tiny_config(corpus, tmp_path / "runs", "tiny", "train.num_steps=2", "optim.warmup_steps=1")
    (tmp_path / "tiny.yaml").write_text(to_yaml(config), encoding="utf-8")
    trained = CliRunner().invoke(app, ["train", str(tmp_path / "tiny.yaml")])
    assert trained.exit_code == 0, trained.output
    run, out = tmp_path / "runs" / "tiny", tmp_path / "scores.json"
    (score,) = scores_of(run, json_file=out)
    summary = read_summary(corpus)
    assert summary.valid is not None
    assert score["name"] == str(corpus / "valid") and score["text_bytes"] == summary.valid.text_bytes
    assert score["num_scored"] == summary.valid.tokens
    assert json.loads(out.read_text())["seq_len"] == config.train.seq_len
    in_training = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["valid_loss"]
    assert score["loss"] == pytest.approx(in_training, rel=0.02)  # other windows of the same text
    (step,) = (run / "checkpoints").iterdir()
    assert scores_of(step, json_file=out) == [score]
    converted = CliRunner().invoke(app, ["convert", str(run), str(tmp_path / "hf")])
    assert converted.exit_code == 0, converted.output
    (exported,) = scores_of(tmp_path / "hf", corpus / "valid", "--seq-len", config.train.seq_len, json_file=out)
    assert exported == score
    assert "data.test or data.split" in said(run, "--split", "test")
