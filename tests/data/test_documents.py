"""Reading documents: every byte once, whatever the size of the pieces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_lite.data import DataError, documents
from megatron_lite.data.documents import Document, iter_documents, python_standard_library_files
from megatron_lite.data.tokenizer import train_tokenizer

TEXTS = {
    "code": "def f(x):\n    return x\n\n\nclass A:\n    pass\n" * 30,
    "one line": "word " * 300,
    "no spaces": "x" * 1000,
    "wide": "文字🙂é" * 200,
    "wide lines": "文字\n🙂é\n\u3000\n" * 100,
    "newlines": "\n" * 500,
    "crlf": "a\r\nb\r\n" * 100,
    "one wide line": "文字" * 30 + "\n",
    "empty": "",
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 64)


@pytest.mark.parametrize("name", list(TEXTS))
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_pieces_are_the_text(tmp_path: Path, name: str, kind: str) -> None:
    text, path = TEXTS[name], tmp_path / f"a.{kind}"
    path.write_bytes(text.encode() if kind == "txt" else json.dumps({"text": text}).encode())
    (document,) = iter_documents([path])
    for _ in range(2):  # as often as one likes
        pieces = list(document.pieces())
        assert "".join(pieces) == text
        assert all(0 < len(piece.encode()) <= 128 for piece in pieces)
    assert len(pieces) > 1 or name == "empty"


@pytest.mark.parametrize("name", ["code", "wide lines", "crlf"])
def test_pieces_give_the_tokens_of_the_whole(tmp_path: Path, name: str) -> None:
    text = TEXTS[name]
    (tmp_path / "a.txt").write_bytes(text.encode())
    tokenizer = train_tokenizer([text], 400)
    whole = tokenizer.encode(text).ids

    def tokens(pieces: list[str]) -> list[int]:
        return [token for piece in pieces for token in tokenizer.encode(piece).ids]

    assert tokens(list(Document(tmp_path / "a.txt").pieces())) == whole
    if name == "code":  # negative control: cuts at any place give other tokens
        assert tokens([text[start : start + 61] for start in range(0, len(text), 61)]) != whole


@pytest.mark.parametrize("name", [name for name in TEXTS if name != "empty"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_split_keeps_every_byte(tmp_path: Path, name: str, kind: str) -> None:
    text, path = TEXTS[name], tmp_path / f"a.{kind}"
    path.write_bytes(text.encode() if kind == "txt" else json.dumps({"text": text}).encode())
    (document,) = iter_documents([path])
    head, tail = ("".join(part.pieces()) for part in document.split(0.25))
    assert head + tail == text
    assert abs(len(tail.encode()) / len(text.encode()) - 0.25) < 0.05
    assert head.endswith("\n") or text.count("\n") < 2


def test_not_utf8_names_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"abc\n" * 100 + b"caf\xe9 au lait\n" + b"abc\n" * 100)
    with pytest.raises(DataError, match=r"latin\.txt: is not UTF-8: bad byte at offset 403"):
        list(Document(path).pieces())
    lines = b'{"text": "good"}\n{"text": "b\xe9d"}\n'
    (tmp_path / "a.jsonl").write_bytes(lines)
    good, bad = iter_documents([tmp_path / "a.jsonl"])
    assert list(good.pieces()) == ["good"]
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .* offset {lines.index(0xE9)}"):
        list(bad.pieces())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": ', "no JSON"),
        ("[1, 2]", "string under 'text'"),
        ('{"txt": "a"}', "string under 'text'"),
        ('{"text": 3}', "string under 'text'"),
        ('{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "good"}}\n\n{line}\n')
    _, bad = iter_documents([tmp_path / "a.jsonl"])
    with pytest.raises(DataError, match=words) as error:
        list(bad.pieces())
    assert "a.jsonl:3" in str(error.value)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none.txt", "cannot be read"), (tmp_path, "is a folder")):
        with pytest.raises(DataError, match=words):
            [list(document.pieces()) for document in iter_documents([path])]


def test_the_standard_library_is_a_corpus() -> None:
    files = python_standard_library_files()
    assert len(files) > 300 and sum(file.stat().st_size for file in files) > 5_000_000
    assert files == python_standard_library_files() == list(dict.fromkeys(files))
    assert all(file.suffix == ".py" and "site-packages" not in file.parts for file in files)
    assert any(file.name == "argparse.py" for file in files)
    assert not any(file.parent.name == "test" for file in files)
