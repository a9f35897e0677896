"""What goes wrong ends in one clear message that says what to do, and exit code 2: through the command.

Everything runs in this process but for what only processes can show.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from megatron_lite.cli import app
from megatron_lite.data import IndexedWriter
from megatron_lite.data.prepare import prepare_corpus
from megatron_lite.utils import run_files
from tests.train.tiny_run import VOCAB_SIZE, keys, make_corpus

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def config_file(folder: Path, corpus: Path) -> Path:
    """The tiny run as a file: its sections as one-line mappings."""
    sections: dict[str, list[str]] = {}
    for key in keys(corpus, folder / "runs"):
        dotted, _, value = key.partition("=")
        section, _, leaf = dotted.partition(".")
        sections.setdefault(section, []).append(f"{leaf}: {value}")
    path = folder / "tiny.yaml"
    path.write_text("".join(f"{name}: {{{', '.join(lines)}}}\n" for name, lines in sections.items()))
    return path


def said(*args: object) -> str:
    """What a command that must fail says: one message on stderr, on stdout at most how many ranks; exit code 2."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("error: ") == 1
    assert result.stdout in ("", "1 rank, as no launcher is in the environment; gloo alone\n")
    return result.stderr


# what is wrong -> (number of processes or None, overrides, what the message has to say)
CONFIG_ERRORS: dict[str, tuple[int | None, list[str], list[str]]] = {
    "tp does not divide heads": (6, ["parallel.tp=3"], ["parallel.tp = 3", "model.num_heads", "parallel.tp=2"]),
    "fewer layers than stages": (4, ["parallel.pp=4"], ["parallel.pp = 4", "model.num_layers", "parallel.pp=2"]),
    "global batch not divisible": (4, ["train.global_batch_size=9"], ["train.global_batch_size = 9", "batch_size=8"]),
    "processes do not fill the layout": (3, ["parallel.tp=2"], ["the number of processes, 3", "--nproc"]),
    "more processes than one": (None, ["parallel.tp=2"], ["the number of processes, 1", "--nproc 2"]),
    "unknown key": (None, ["model.hidden=32"], ["model.hidden", "is not a key", "did you mean model.hidden_size?"]),
    "misspelt key": (None, ["train.num_step=3"], ["train.num_step", "did you mean train.num_steps?"]),
    "wrong type": (None, ["train.num_steps=many"], ["train.num_steps = many", "an integer >= 1"]),
    "no key=value": (None, ["parallel.tp"], ["must be key=value", "parallel.tp=value"]),
    "no such data": (None, ["data.train=nowhere/train"], ["nowhere/train.bin", "megatron-lite data"]),
    "no such tokenizer": (None, ["data.tokenizer=nowhere"], ["data.tokenizer = nowhere", "a folder that holds one"]),
    "no such checkpoint": (None, ["init.from_hf=nowhere"], ["init.from_hf = nowhere", "does not exist"]),
    "no processes": (0, [], ["--nproc is 0", "at least 1"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIG_ERRORS)
def test_config_errors_before_any_process_starts(corpus: Path, tmp_path: Path, case: str) -> None:
    nproc, overrides, parts = CONFIG_ERRORS[case]
    processes = [] if nproc is None else ["--nproc", nproc]
    message = said("train", config_file(tmp_path, corpus), *processes, *overrides)
    for part in parts:
        assert part in message, message
    assert not (tmp_path / "runs").exists()


def test_all_config_errors_come_at_once(corpus: Path, tmp_path: Path) -> None:
    broken = ["parallel.pp=4", "train.global_batch_size=9", "model.hiden_size=3", "optim.lr=-1", "data.train=no/where"]
    message = said("train", config_file(tmp_path, corpus), "--nproc", 4, *broken)
    assert message.startswith("error: 5 problems in")
    for key in broken:
        assert key.partition("=")[0] in message


def test_no_config_file(tmp_path: Path) -> None:
    assert "quickstart.yaml" in said("train", CONFIGS / "runs" / "quikstart.yaml")
    assert "there is no such file" in said("verify", tmp_path / "nowhere.yaml")


def outside_vocabulary(folder: Path) -> str:
    with IndexedWriter(folder / "bad", "uint16") as writer:
        writer.append([*range(200), VOCAB_SIZE + 7, *range(200)])
        writer.end_document()
    return f"data.train={folder / 'bad'}"


def empty(folder: Path) -> str:
    for suffix in (".bin", ".idx"):
        (folder / f"bad{suffix}").touch()
    return f"data.train={folder / 'bad'}"


def truncated(folder: Path, suffix: str) -> str:
    outside_vocabulary(folder)
    path = folder / f"bad{suffix}"
    path.write_bytes(path.read_bytes()[:-10])
    return f"data.train={folder / 'bad'}"


def too_short(folder: Path) -> str:
    with IndexedWriter(folder / "bad", "uint16") as writer:
        writer.append([1, 2, 3])
        writer.end_document()
    return f"data.train={folder / 'bad'}"


def larger_tokenizer(folder: Path) -> str:
    text = folder / "other.txt"
    text.write_text(" ".join(f"word{i}th {i * i}" for i in range(3000)))
    prepare_corpus([text], folder / "other", vocab_size=VOCAB_SIZE + 50, progress=False)
    return f"data.tokenizer={folder / 'other' / 'tokenizer.json'}"


DATA_ERRORS: dict[str, tuple[Callable[[Path], str], list[str]]] = {
    "token id outside the vocabulary": (outside_vocabulary, ["bad.bin: token 200 has the id 307", "model.vocab_size"]),
    "empty files": (empty, ["bad.idx"]),
    "truncated .bin": (lambda folder: truncated(folder, ".bin"), ["bad.bin"]),
    "truncated .idx": (lambda folder: truncated(folder, ".idx"), ["bad.idx"]),
    "fewer tokens than a sequence": (too_short, ["3 tokens are too few", "set train.seq_len to at most 2"]),
    "tokenizer with more tokens than the model": (larger_tokenizer, ["has 350 tokens", "use model.vocab_size=350"]),
}  # fmt: skip


@pytest.mark.parametrize("case", DATA_ERRORS)
def test_data_errors(corpus: Path, tmp_path: Path, case: str) -> None:
    make, parts = DATA_ERRORS[case]
    message = said("train", config_file(tmp_path, corpus), make(tmp_path))
    for part in parts:
        assert part in message, message
    assert message.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def checkpoint(corpus: Path, tmp_path: Path) -> Path:
    """A Hugging Face folder of the tiny model, made by a run of one step."""
    run = CliRunner().invoke(
        app,
        ["train", str(config_file(tmp_path, corpus)), "train.num_steps=1", "optim.warmup_steps=0", "run.name=first"],
    )
    assert run.exit_code == 0, run.output
    converted = CliRunner().invoke(app, ["convert", str(tmp_path / "runs" / "first"), str(tmp_path / "hf")])
    assert converted.exit_code == 0, converted.output
    return tmp_path / "hf"


def test_checkpoint_errors(corpus: Path, tmp_path: Path, checkpoint: Path) -> None:
    start = ("train", config_file(tmp_path, corpus), f"init.from_hf={checkpoint}")
    assert "model.num_heads" in said(*start, "model.num_heads=2")

    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    missing = "model.layers.1.mlp.down_proj.weight"
    save_file({name: value for name, value in tensors.items() if name != missing}, file, {"format": "pt"})
    assert missing in said(*start)
    save_file({**tensors, "model.extra": torch.ones(1)}, file, {"format": "pt"})
    assert "model.extra" in said(*start)
    file.write_bytes(file.read_bytes()[:-100])
    assert "model.safetensors" in said(*start)
    file.unlink()
    assert "model.safetensors" in said(*start)

    described = json.loads((checkpoint / "config.json").read_text())
    described |= {"architectures": ["MambaForCausalLM"], "model_type": "mamba"}
    (checkpoint / "config.json").write_text(json.dumps(described))
    message = said(*start)
    assert "mamba" in message.lower() and "llama" in message


def test_convert_and_report_name_what_is_missing(tmp_path: Path) -> None:
    assert "has no checkpoint" in said("convert", tmp_path, tmp_path / "out")
    assert "metrics.jsonl" in said("report", tmp_path)
    (tmp_path / run_files.METRICS).touch()
    assert "has no step yet" in said("report", tmp_path)


def test_data_command_errors(tmp_path: Path) -> None:
    assert "no text files are given" in said("data", "--out", tmp_path)
    assert "nowhere.txt" in said("data", tmp_path / "nowhere.txt", "--out", tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 and more")
    assert "is not UTF-8: bad byte at offset 3" in said("data", tmp_path / "latin.txt", "--out", tmp_path)


VERIFY_ERRORS = {
    "tp=3": "parallel.tp = 3",
    "pp=8": "parallel.pp = 8",
    "tp=2,fp=2": "'fp=2' is not understood",
    "tp=4,dp=4": "needs 16 processes",
    ";": "names no layout",
}


@pytest.mark.parametrize("layouts", VERIFY_ERRORS)
def test_verify_errors(layouts: str) -> None:
    assert VERIFY_ERRORS[layouts] in said("verify", CONFIGS / "runs" / "tiny-proof.yaml", "--layouts", layouts)


def test_verify_lists_the_reductions() -> None:
    message = said("verify", CONFIGS / "runs" / "tiny-proof.yaml", "--without", "everything")
    for name in ("sequence-parallel-norms", "tied-embeddings", "data-parallel", "loss-normaliser", "gradient-norm"):
        assert name in message


def test_debug_shows_where(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(tmp_path), "--debug"])
    assert result.exit_code == 2
    assert "Traceback" in result.stderr and "error: " in result.stderr


@dataclass(frozen=True)
class Limit:
    """A file-size limit stands in for a disk without space: the same path through the code, without a disk to fill."""

    num_bytes: int

    def __call__(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.num_bytes, self.num_bytes))


def run_without_space(config: Path, limit: int, *args: str) -> str:
    """The one error of a run whose files may not grow beyond a limit."""
    program = [sys.executable, "-m", "megatron_lite", "train", str(config), *args]
    done = subprocess.run(program, capture_output=True, text=True, timeout=180, preexec_fn=Limit(limit))
    assert done.returncode == 2, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr
    assert "no space left to write it" in error and "free some space" in error
    return error


def test_no_space_left_for_metrics(corpus: Path, tmp_path: Path) -> None:
    """3000 bytes hold the config and some steps."""
    assert run_files.METRICS in run_without_space(config_file(tmp_path, corpus), 3000)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_no_space_left_for_a_checkpoint(corpus: Path, tmp_path: Path, asynchronous: str) -> None:
    """50,000 bytes hold the metrics, and not the state of a rank. What was there stays, and is gone on from."""
    config, checkpoints = config_file(tmp_path, corpus), tmp_path / "runs" / "tiny" / run_files.CHECKPOINTS
    short = CliRunner().invoke(app, ["train", str(config), "train.num_steps=4", "optim.decay_steps=12"])
    assert short.exit_code == 0, short.output
    more = ("parallel.pp=2", "checkpoint.interval=4", f"checkpoint.asynchronous={asynchronous}")
    error = run_without_space(config, 50_000, "--nproc", "2", *more)
    assert f"{checkpoints}/.step-00000008.partial/rank-0000" in error
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000004"], "nothing lost, nothing half-written"
    again = CliRunner().invoke(app, ["train", str(config)])
    assert again.exit_code == 0 and f"going on from {checkpoints}/step-00000004, after step 4" in again.stdout
