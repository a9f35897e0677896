"""From text to token files: splits, tokenizers, options, and what is already there."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import sentencepiece

from megatron_lite.data import DataError, IndexedReader, TokenDataset, documents, encode
from megatron_lite.data.prepare import CorpusSummary, prepare_corpus, read_summary
from megatron_lite.data.tokenizer import END_OF_DOCUMENT, load_tokenizer, save_tokenizer
from megatron_lite.data.tokenizer_training import train_tokenizer

MADE = ["meta.json", "tokenizer.json", "train.bin", "train.idx", "valid.bin", "valid.idx", "valid.txt"]
SPLITS = ("train", "valid", "test")


def write_texts(folder: Path, count: int = 40) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = []
    for number in range(count):
        paths.append(folder / f"{number:03}.txt")
        paths[-1].write_text(f"document {number}: the cat sat on mat {number * 7}, é 文字\n" * (1 + number % 5))
    return paths


def prepare(files: list[Path], out: Path, **options: Any) -> CorpusSummary:
    return prepare_corpus(files, out, **{"vocab_size": 300, "progress": False, **options})


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


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_document_lands_in_one_split(tmp_path: Path) -> None:
    paths = write_texts(tmp_path / "text")
    summary = prepare(paths, tmp_path / "out", valid_fraction=0.25, test_fraction=0.25, seed=1)
    found = {split: documents_of(summary, split) for split in SPLITS}
    texts = [path.read_text() for path in paths]
    assert sorted(text for texts in found.values() for text in texts) == sorted(texts)
    for split in SPLITS:
        assert [text for text in texts if text in found[split]] == found[split], "documents keep their order"
    assert 4 <= len(found["valid"]) <= 16 and 4 <= len(found["test"]) <= 16
    assert summary.valid_text is not None and Path(summary.valid_text).read_text() == "".join(found["valid"])
    assert summary.test_text is not None and Path(summary.test_text).read_text() == "".join(found["test"])
    assert names_in(tmp_path / "out") == sorted([*MADE, "test.bin", "test.idx", "test.txt"])
    assert summary.dtype == "uint16" and summary.vocab_size == 300
    assert read_summary(tmp_path / "out") == summary
    TokenDataset([summary.train.prefix], 16).check_token_ids(300)
    # Without a test split nothing moves between the others.
    two = prepare(paths, tmp_path / "two", valid_fraction=0.25, seed=1)
    assert documents_of(two, "valid") == found["valid"]
    assert two.test is None and two.test_text is None and names_in(tmp_path / "two") == MADE


def test_the_split_follows_text_and_seed_not_names_kinds_and_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_texts(tmp_path / "text")
    save_tokenizer(train_tokenizer([path.read_text() for path in paths], 300), tmp_path / "tokenizer.json")

    def valid_of(name: str, files: list[Path], seed: int) -> list[str]:
        out = tmp_path / name
        summary = prepare(files, out, tokenizer=tmp_path, seed=seed, valid_fraction=0.25)
        return documents_of(summary, "valid")

    first = valid_of("first", paths, 1)
    results = {name: (tmp_path / "first" / name).read_bytes() for name in MADE if name != "meta.json"}
    assert sorted(valid_of("backward", paths[::-1], 1)) == sorted(first)
    assert sorted(valid_of("other seed", paths, 2)) != sorted(first)
    lines = "".join(json.dumps({"text": path.read_text()}) + "\n\n" for path in paths)
    (tmp_path / "all.jsonl").write_text(lines)
    (tmp_path / "all.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    parquet.write_table(arrow.table({"text": [path.read_text() for path in paths]}), tmp_path / "all.parquet")
    for kind in ("jsonl", "jsonl.gz", "parquet"):
        valid_of(kind, [tmp_path / f"all.{kind}"], 1)
        assert {name: (tmp_path / kind / name).read_bytes() for name in results} == results
    # One piece after the other, and read as streams: the same bytes as in parallel.
    monkeypatch.setattr(encode, "BATCH_PIECES", 1)
    monkeypatch.setattr(documents, "HELD_BYTES", 100)
    valid_of("serial", paths, 1)
    assert {name: (tmp_path / "serial" / name).read_bytes() for name in results} == results


def test_each_split_gets_a_document(tmp_path: Path) -> None:
    paths = write_texts(tmp_path / "text", 3)
    for number, fractions in enumerate([(0.001, 0.0), (0.999, 0.0), (0.001, 0.001), (0.0, 0.999), (0.5, 0.499)]):
        valid, test = fractions
        summary = prepare(paths, tmp_path / f"out {number}", valid_fraction=valid, test_fraction=test)
        wanted = ["train", *(["valid"] if valid else []), *(["test"] if test else [])]
        found = [documents_of(summary, split) for split in wanted]
        assert all(found) and sorted(text for texts in found for text in texts) == sorted(
            path.read_text() for path in paths
        )
    with pytest.raises(DataError, match="among the 2 documents: 2, too few for train and valid and test"):
        prepare(paths[:2], tmp_path / "none", valid_fraction=0.1, test_fraction=0.1)
    assert not (tmp_path / "none").exists()


def test_a_document_that_moves_to_an_empty_split_takes_its_copies_along(tmp_path: Path) -> None:
    paths = write_texts(tmp_path / "text", 3)
    summary = prepare(paths * 4, tmp_path / "out", valid_fraction=0.001, test_fraction=0.001)
    found = [documents_of(summary, split) for split in SPLITS]
    assert [(len(texts), len(set(texts))) for texts in found] == [(4, 1)] * 3
    assert set.union(*map(set, found)) == {path.read_text() for path in paths}
    with pytest.raises(DataError, match="among the 4 documents: 1, too few for train and valid"):
        prepare(paths[:1] * 4, tmp_path / "none", valid_fraction=0.1)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("kind", ["txt", "jsonl", "txt.gz"])
def test_the_end_of_a_lonely_text_is_held_out(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "HELD_BYTES", 1000)
    text = "".join(f"line {number} of a long text\n" for number in range(500))
    path, empty = tmp_path / f"a.{kind}", tmp_path / "empty.txt"
    content = (json.dumps({"text": text}) if kind == "jsonl" else text).encode()
    path.write_bytes(gzip.compress(content) if kind == "txt.gz" else content)
    empty.touch()
    summary = prepare([empty, path], tmp_path / "out", valid_fraction=0.1, test_fraction=0.2)
    (train,), (valid,), (test,) = (documents_of(summary, split) for split in SPLITS)
    assert train + valid + test == text and train.endswith("\n") and valid.endswith("\n")
    assert 0.09 < len(valid) / len(text) < 0.11 and 0.19 < len(test) / len(text) < 0.21
    path = tmp_path / "short.txt"
    path.write_text("x")
    with pytest.raises(DataError, match=r"short\.txt: is the only document, and too short"):
        prepare([path], tmp_path / "short", valid_fraction=0.1)


def test_long_documents_get_the_tokens_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer that puts a space before a text puts it there once, however many pieces it is read in."""
    text = "".join(f"line {number} of a long text\n" for number in range(200))
    model = tmp_path / "tokenizer.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_prefix=str(model.with_suffix("")), model_type="bpe",
        vocab_size=320, byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2,
    )  # fmt: skip
    monkeypatch.setattr(documents, "PIECE_BYTES", 200)
    (tmp_path / "a.txt").write_text(text)
    summary = prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer=model, valid_fraction=0)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokens = IndexedReader(summary.train.prefix).document(0).tolist()
    assert tokens == [*theirs.encode(text), theirs.eos_id()]
    monkeypatch.setattr(encode, "as_continuation", lambda tokenizer: None)  # negative control
    summary = prepare([tmp_path / "a.txt"], tmp_path / "bad", tokenizer=model, valid_fraction=0)
    assert IndexedReader(summary.train.prefix).document(0).tolist() != tokens


def test_tokenizers_of_ones_own(tmp_path: Path) -> None:
    paths = write_texts(tmp_path / "text", 5)
    tokenizer = train_tokenizer(["other words entirely " * 9], 270)
    tokenizer.enable_truncation(4)  # must not shorten the corpus
    tokenizer.add_special_tokens(["<end>"])
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    summary = prepare(paths, tmp_path / "out", tokenizer=tmp_path, valid_fraction=0.4)
    assert summary.vocab_size <= 271 and summary.end_of_document_id == 0
    assert sorted(documents_of(summary, "train") + documents_of(summary, "valid")) == sorted(
        p.read_text() for p in paths
    )
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<end>"}}')
    summary = prepare(paths, tmp_path / "declared", tokenizer=tmp_path)
    assert summary.end_of_document_id == tokenizer.token_to_id("<end>")
    documents_of(summary, "train")
    summary = prepare(paths, tmp_path / "named", tokenizer=tmp_path, end_token=END_OF_DOCUMENT)
    assert summary.end_of_document_id == 0


def test_trained_types(tmp_path: Path) -> None:
    paths = write_texts(tmp_path / "text", 5)
    summary = prepare(paths, tmp_path / "unigram", tokenizer_type="unigram", valid_fraction=0)
    assert documents_of(summary, "train") == [path.read_text() for path in paths]
    summary = prepare(paths, tmp_path / "wordpiece", tokenizer_type="wordpiece", valid_fraction=0)
    words = json.loads(Path(summary.tokenizer).read_text())["model"]["type"]
    assert words == "WordPiece" and summary.train.documents == 5


def test_a_large_vocabulary_is_stored_in_int32(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["text " * 9], 270)
    tokenizer.add_tokens([f"<extra {number}>" for number in range(65500)])
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    paths = write_texts(tmp_path / "text", 3)
    summary = prepare(paths, tmp_path / "out", tokenizer=tmp_path / "tokenizer.json")
    assert summary.dtype == "int32" and IndexedReader(summary.train.prefix).dtype == np.int32


def test_text_that_looks_like_a_special_token_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"never write {END_OF_DOCUMENT} in a text\n" * 9)
    summary = prepare([tmp_path / "a.txt"], tmp_path / "out", valid_fraction=0)
    assert END_OF_DOCUMENT in documents_of(summary, "train")[0]  # and documents_of saw no end but the last


def test_what_is_not_utf8(tmp_path: Path) -> None:
    paths = write_texts(tmp_path / "text", 10)
    paths[3].write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"003\.txt: is not UTF-8: bad byte at offset 3"):
        prepare(paths, tmp_path / "out")
    summary = prepare(paths, tmp_path / "out", errors="skip")
    assert len(summary.skipped) == 1 and "003.txt" in summary.skipped[0]
    assert summary.valid is not None and summary.train.documents + summary.valid.documents == 9
    with pytest.raises(DataError, match="UTF-8"):  # what left documents out is no answer to who wants them all
        prepare(paths, tmp_path / "out")


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
            prepare(paths, tmp_path / "out")
    bad: list[dict[str, Any]] = [
        {"valid_fraction": 1.0},
        {"valid_fraction": -0.1},
        {"test_fraction": 1.0},
        {"test_fraction": 0.5, "valid_fraction": 0.5},
        {"errors": "ignore"},
        {"vocab_size": 10},
        {"tokenizer_type": "bert"},
    ]
    for arguments in bad:
        with pytest.raises(ValueError, match=next(iter(arguments))):
            prepare([path], tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="megatron-lite data"):
        read_summary(tmp_path)
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(DataError, match="damaged"):
        read_summary(tmp_path)


def test_progress_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(write_texts(tmp_path / "text", 3), tmp_path / "out", progress=True)
    shown = capsys.readouterr()
    assert "encoding" in shown.err and shown.out == ""
