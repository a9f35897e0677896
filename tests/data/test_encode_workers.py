"""Processes that encode give what this process gives, say so when one is killed, and leave none behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lite.data import DataError, documents, encode, prepare
from megatron_lite.data.documents import Position
from megatron_lite.data.encode import Batch, Encoder, SplitTokens
from megatron_lite.data.encode_workers import Workers
from megatron_lite.data.prepare import prepare_corpus
from megatron_lite.data.splits import TRAIN
from megatron_lite.data.tokenizer_training import train_tokenizer
from tests.data.test_restart import ROOT, content

OPTIONS: dict[str, Any] = {"vocab_size": 300, "valid_fraction": 0.2, "test_fraction": 0.1, "progress": False}


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Documents of many lengths, in small pieces and batches."""
    monkeypatch.setattr(encode, "BATCH_PIECES", 5)
    monkeypatch.setattr(documents, "PIECE_BYTES", 200)
    path = tmp_path / "text.jsonl"
    texts = ["".join(f"{number}, line {line}: é 文字\n" for line in range(number % 23)) for number in range(120)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def is_alive(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("kind", ["bpe", "unigram"])  # unigram puts a space before a text: it has a continuation
def test_the_same_bytes(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    train_tokenizer(corpus.read_text().splitlines(), 300, kind).save(str(tmp_path / "tokenizer.json"))
    options = {**OPTIONS, "tokenizer": tmp_path / "tokenizer.json"}
    before = children()
    prepare_corpus([corpus], tmp_path / "alone", **options)
    monkeypatch.setattr(prepare, "WORKERS_FROM_BYTES", 0)
    started: list[int] = []
    enter = Workers.__enter__

    def counted(self: Workers) -> Workers:
        started.append(self.count)
        return enter(self)

    monkeypatch.setattr(Workers, "__enter__", counted)
    prepare_corpus([corpus], tmp_path / "workers", **options)
    assert len(started) == 1 and started[0] >= 1 and children() == before
    assert content(tmp_path / "workers") == content(tmp_path / "alone")
    # Negative control: without the end token behind each document it is another file.
    monkeypatch.setattr(prepare, "end_of_document_id", lambda *_: 7)
    prepare_corpus([corpus], tmp_path / "other", **options)
    assert content(tmp_path / "other")["train.bin"] != content(tmp_path / "alone")["train.bin"]


@pytest.mark.parametrize("dtype", ["<u2", "<i4"])
def test_a_killed_worker(tmp_path: Path, dtype: str) -> None:
    tokenizer = train_tokenizer(["some text for it"], 300)
    encoder = Encoder(tokenizer, 0, np.dtype(dtype), num_workers=2)
    before = children()
    given: list[int] = []

    def batches() -> Any:
        for number in range(60):
            if number == 20:
                os.kill(int(min(children() - before)), signal.SIGKILL)
            yield Batch(Position(number), ["the text"], [TRAIN], [True], [True])

    def sink(batch: Batch, tokens: list[SplitTokens]) -> None:
        assert tokens[TRAIN].tokens.dtype == np.dtype(dtype)
        given.append(batch.position.file)

    with pytest.raises(DataError, match="ended with code -9"):
        encoder.run(batches(), sink)
    assert given == list(range(len(given))) and 15 <= len(given) < 60  # in order, none left out
    assert children() == before


def test_what_was_read_before_an_error_is_given_but_nothing_behind_a_failed_write() -> None:
    encoder = Encoder(train_tokenizer(["some text for it"], 300), 0, np.dtype("<u2"))
    given: list[int] = []

    def batches(stop: int) -> Any:
        for number in range(stop):
            yield Batch(Position(number), ["the text"], [TRAIN], [True], [True])
        raise DataError("damaged")

    with pytest.raises(DataError, match="damaged"):
        encoder.run(batches(7), lambda batch, tokens: given.append(batch.position.file))
    assert given == list(range(7))
    given.clear()

    def full_once(batch: Batch, tokens: list[SplitTokens]) -> None:
        given.append(batch.position.file)
        if batch.position.file == 2:
            raise DataError("full")

    with pytest.raises(DataError, match="full"):
        encoder.run(batches(7), full_once)
    assert given == [0, 1, 2]


SCRIPT = """
import sys
from megatron_lite.data import prepare
prepare.WORKERS_FROM_BYTES = 0
prepare.prepare_corpus([sys.argv[2]], sys.argv[1], tokenizer=sys.argv[3], progress=False)
"""  # without `if __name__ == "__main__"`, as in a notebook


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_command_leaves_no_process(tmp_path: Path, by: signal.Signals) -> None:
    corpus = tmp_path / "text.jsonl"
    text = "some words for it, in a line\n" * 200
    corpus.write_text("".join(json.dumps({"text": f"{number} {text}"}) + "\n" for number in range(10000)))
    script = tmp_path / "script.py"
    command = [sys.executable, str(script), str(tmp_path / "out"), str(corpus), str(tmp_path / "tokenizer.json")]
    train_tokenizer(["some words for it, in a line\n"], 300).save(str(tmp_path / "tokenizer.json"))
    script.write_text(SCRIPT)
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True
    ) as process:
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline = time.monotonic() + 60
        while not (workers := listed.read_text().split()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert workers
        time.sleep(0.3)
        os.killpg(process.pid, by) if by == signal.SIGINT else process.send_signal(by)
        assert process.wait(timeout=60) != 0
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, workers))
