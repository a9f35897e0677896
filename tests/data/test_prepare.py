"""From text to token files, and nothing left behind where that fails."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lite.data import DataError, IndexedReader, TokenDataset, prepare
from megatron_lite.data.prepare import CorpusSummary, prepare_corpus, read_summary
from megatron_lite.data.tokenizer import END_OF_DOCUMENT, load_tokenizer, save_tokenizer, train_tokenizer
from megatron_lite.utils.files import AtomicFile

MADE = ["meta.json", "tokenizer.json", "train.bin", "train.idx", "valid.bin", "valid.idx", "valid.txt"]


def write_texts(folder: Path, count: int = 40) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = []
    for number in range(count):
        paths.append(folder / f"{number:03}.txt")
        paths[-1].write_text(f"document {number}: the cat sat on mat {number * 7}, é 文字\n" * (1 + number % 5))
    return paths


def documents_of(summary: CorpusSummary, split: str) -> list[str]:
    """The documents of a split, decoded from its tokens; each must end in the end-of-document token."""
    part = getattr(summary, split)
    reader, tokenizer = IndexedReader(part.prefix), load_tokenizer(summary.tokenizer)
    assert (reader.num_documents, reader.num_tokens) == (part.documents, part.tokens)
    decoded = []
    for number in range(reader.num_documents):
        tokens = reader.document(number).tolist()
        assert tokens[-1] == summary.end_of_document_id not in tokens[:-1]
        decoded.append(tokenizer.decode(tokens[:-1], skip_special_tokens=False))
    assert sum(len(text.encode()) for text in decoded) == part.text_bytes
    return decoded


def test_every_document_lands_in_one_split(tmp_path: Path) -> None:
    paths = write_texts(tmp_path / "text")
    summary = prepare_corpus(paths, tmp_path / "out", vocab_size=300, valid_fraction=0.25, seed=1, progress=False)
    train, valid = documents_of(summary, "train"), documents_of(summary, "valid")
    texts = [path.read_text() for path in paths]
    assert sorted(train + valid) == sorted(texts)
    assert [text for text in texts if text in train] == train, "documents keep their order"
    assert 4 <= len(valid) <= 16
    assert summary.valid_text is not None and Path(summary.valid_text).read_text() == "".join(valid)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == MADE
    assert summary.dtype == "uint16" and summary.vocab_size == 300
    assert read_summary(tmp_path / "out") == summary
    TokenDataset([summary.train.prefix], 16).check_token_ids(300)


def test_the_split_follows_text_and_seed_not_names_and_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_texts(tmp_path / "text")

    def valid_of(name: str, files: list[Path], seed: int) -> list[str]:
        out = tmp_path / name
        return documents_of(
            prepare_corpus(files, out, vocab_size=300, seed=seed, valid_fraction=0.25, progress=False), "valid"
        )

    first = valid_of("first", paths, 1)
    tokens = (tmp_path / "first" / "train.bin").read_bytes()
    assert valid_of("again", paths, 1) == first
    assert (tmp_path / "again" / "train.bin").read_bytes() == tokens
    assert sorted(valid_of("backward", paths[::-1], 1)) == sorted(first)
    assert sorted(valid_of("other seed", paths, 2)) != sorted(first)
    lines = tmp_path / "all.jsonl"
    lines.write_text("".join(json.dumps({"text": path.read_text()}) + "\n\n" for path in paths))
    assert valid_of("lines", [lines], 1) == first
    for limits in ({"BATCH_BYTES": 1}, {"BATCH_PIECES": 3}):
        for name, value in limits.items():
            monkeypatch.setattr(prepare, name, value)
        valid_of("small batches", paths, 1)
        assert (tmp_path / "small batches" / "train.bin").read_bytes() == tokens


def test_each_split_gets_a_document(tmp_path: Path) -> None:
    paths = write_texts(tmp_path / "text", 2)
    for fraction in (0.001, 0.999):
        summary = prepare_corpus(paths, tmp_path / "out", vocab_size=300, valid_fraction=fraction, progress=False)
        assert len(documents_of(summary, "train")) == len(documents_of(summary, "valid")) == 1


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_the_end_of_a_lonely_text_is_held_out(tmp_path: Path, kind: str) -> None:
    text = "".join(f"line {number} of a long text\n" for number in range(500))
    path = tmp_path / f"a.{kind}"
    path.write_text(text if kind == "txt" else json.dumps({"text": text}))
    summary = prepare_corpus([path], tmp_path / "out", vocab_size=300, valid_fraction=0.1, progress=False)
    (train,), (valid,) = documents_of(summary, "train"), documents_of(summary, "valid")
    assert train + valid == text and train.endswith("\n")
    assert 0.09 < len(valid) / len(text) < 0.11


def test_no_validation_split(tmp_path: Path) -> None:
    paths = write_texts(tmp_path / "text", 5)
    prepare_corpus(paths, tmp_path / "out", vocab_size=300, valid_fraction=0.5, progress=False)
    summary = prepare_corpus(paths, tmp_path / "out", vocab_size=300, valid_fraction=0, progress=False)
    assert summary.valid is None and summary.valid_text is None and summary.train.documents == 5
    # What the run before left of a validation split would be training text now.
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == MADE[:4]


def test_a_tokenizer_of_ones_own(tmp_path: Path) -> None:
    paths = write_texts(tmp_path / "text", 5)
    tokenizer = train_tokenizer(["other words entirely " * 9], 270)
    tokenizer.enable_truncation(4)  # must not shorten the corpus
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    summary = prepare_corpus(paths, tmp_path / "out", tokenizer=tmp_path, valid_fraction=0.4, progress=False)
    assert summary.vocab_size <= 270
    assert sorted(documents_of(summary, "train") + documents_of(summary, "valid")) == sorted(
        p.read_text() for p in paths
    )


def test_a_large_vocabulary_is_stored_in_int32(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["text " * 9], 270)
    tokenizer.add_tokens([f"<extra {number}>" for number in range(65500)])
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    paths = write_texts(tmp_path / "text", 3)
    summary = prepare_corpus(paths, tmp_path / "out", tokenizer=tmp_path / "tokenizer.json", progress=False)
    assert summary.dtype == "int32" and IndexedReader(summary.train.prefix).dtype == np.int32


def test_text_that_looks_like_a_special_token_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"never write {END_OF_DOCUMENT} in a text\n" * 9)
    summary = prepare_corpus([tmp_path / "a.txt"], tmp_path / "out", vocab_size=300, valid_fraction=0, progress=False)
    assert END_OF_DOCUMENT in documents_of(summary, "train")[0]  # and documents_of saw no end but the last


def test_what_is_not_utf8(tmp_path: Path) -> None:
    paths = write_texts(tmp_path / "text", 10)
    paths[3].write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"003\.txt: is not UTF-8: bad byte at offset 3"):
        prepare_corpus(paths, tmp_path / "out", vocab_size=300, progress=False)
    assert not (tmp_path / "out").exists()
    summary = prepare_corpus(paths, tmp_path / "out", vocab_size=300, errors="skip", progress=False)
    assert len(summary.skipped) == 1 and "003.txt" in summary.skipped[0]
    assert summary.valid is not None and summary.train.documents + summary.valid.documents == 9


def test_bad_requests(tmp_path: Path) -> None:
    (path,) = write_texts(tmp_path / "text", 1)
    (tmp_path / "empty.txt").touch()
    requests: list[tuple[list[Path], str]] = [
        ([], "no text files"),
        ([tmp_path / "none.txt"], "none.txt"),
        ([tmp_path / "empty.txt"], "no text"),
    ]
    for paths, words in requests:
        with pytest.raises(DataError, match=words):
            prepare_corpus(paths, tmp_path / "out", progress=False)
    bad: list[dict[str, Any]] = [
        {"valid_fraction": 1.0},
        {"valid_fraction": -0.1},
        {"errors": "ignore"},
        {"vocab_size": 10},
    ]
    for arguments in bad:
        with pytest.raises(ValueError, match=next(iter(arguments))):
            prepare_corpus([path], tmp_path / "out", progress=False, **arguments)
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="megatron-lite data"):
        read_summary(tmp_path)
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(DataError, match="damaged"):
        read_summary(tmp_path)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("before", [False, True], ids=["fresh", "over an old corpus"])
def test_no_space_left_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, before: bool
) -> None:
    paths, out = write_texts(tmp_path / "text"), tmp_path / "out"
    if before:
        prepare_corpus(paths[:20], out, vocab_size=280, valid_fraction=0.25, progress=False)
    old = {path.name: path.read_bytes() for path in out.iterdir()} if before else {}
    finish = AtomicFile.finish

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def finish_on_a_full_disk(self: AtomicFile) -> None:
        with monkeypatch.context() as patch:
            if self.path.name == name:
                patch.setattr(os, "fsync", full)
            finish(self)

    monkeypatch.setattr(AtomicFile, "finish", finish_on_a_full_disk)
    with pytest.raises(DataError, match=rf"{name}: no space left"):
        prepare_corpus(paths, out, vocab_size=300, valid_fraction=0.25, progress=False)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == old


def test_progress_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_corpus(write_texts(tmp_path / "text", 3), tmp_path / "out", vocab_size=300)
    shown = capsys.readouterr()
    assert "encoding" in shown.err and shown.out == ""
