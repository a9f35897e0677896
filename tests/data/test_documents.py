"""Reading documents: every byte once, whatever the size of the pieces, and on from any place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_lite.data import DataError, documents
from megatron_lite.data.documents import Document, Position, iter_documents, python_standard_library_files
from megatron_lite.data.sources import BadDocument, look_at
from megatron_lite.data.tokenizer_training import train_tokenizer

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
    """Pieces of 64 bytes, and files of more than 256 that are read as a stream."""
    monkeypatch.setattr(documents, "PIECE_BYTES", 64)
    monkeypatch.setattr(documents, "HELD_BYTES", 256)


def read(paths: Sequence[Path], start: Position | None = None) -> list[Document]:
    return list(iter_documents([look_at(path) for path in paths], start=start))


def pieces_of(document: Document) -> list[str]:
    return [piece.decode() for piece in document.pieces(document.held())]


def write(folder: Path, kind: str, text: str) -> Path:
    path = folder / f"a.{kind}"
    path.write_bytes(text.encode() if kind == "txt" else json.dumps({"text": text}).encode())
    return path


@pytest.mark.parametrize("name", list(TEXTS))
def test_pieces_are_the_text(tmp_path: Path, name: str) -> None:
    text = TEXTS[name]
    found = []
    for kind in ("txt", "jsonl"):
        (document,) = read([write(tmp_path, kind, text)])
        for _ in range(2):  # as often as one likes
            found.append(pieces_of(document))
            assert "".join(found[-1]) == text
            assert all(0 < len(piece.encode()) <= 64 for piece in found[-1])
    assert all(pieces == found[0] for pieces in found), "the pieces depend on the text alone"
    assert len(found[0]) > 1 or name == "empty"


@pytest.mark.parametrize("name", ["code", "wide", "wide lines"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_reading_goes_on_behind_any_piece(tmp_path: Path, name: str, kind: str) -> None:
    (document,) = read([write(tmp_path, kind, TEXTS[name])])
    pieces = pieces_of(document)
    done = 0
    for number, piece in enumerate(pieces[:-1], start=1):
        done += len(piece.encode())
        assert pieces_of(replace(document, start=done)) == pieces[number:]


@pytest.mark.parametrize("name", ["code", "wide lines", "crlf"])
def test_pieces_give_the_tokens_of_the_whole(tmp_path: Path, name: str) -> None:
    text = TEXTS[name]
    tokenizer = train_tokenizer([text], 400)
    whole = tokenizer.encode(text).ids

    def tokens(pieces: list[str]) -> list[int]:
        return [token for piece in pieces for token in tokenizer.encode(piece).ids]

    (document,) = read([write(tmp_path, "txt", text)])
    assert tokens(pieces_of(document)) == whole
    if name == "code":  # negative control: cuts at any place give other tokens
        assert tokens([text[start : start + 61] for start in range(0, len(text), 61)]) != whole


@pytest.mark.parametrize("name", [name for name in TEXTS if name != "empty"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_parts_keep_every_byte(tmp_path: Path, name: str, kind: str) -> None:
    text = TEXTS[name]
    (document,) = read([write(tmp_path, kind, text)])
    head, tail = ("".join(pieces_of(part)) for part in document.parts([0.25]))
    assert head + tail == text
    assert abs(len(tail.encode()) / len(text.encode()) - 0.25) < 0.05
    assert head.endswith("\n") or text.count("\n") < 2
    three = ["".join(pieces_of(part)) for part in document.parts([0.2, 0.3])]
    assert "".join(three) == text
    for part, fraction in zip(three, (0.5, 0.2, 0.3), strict=True):
        assert abs(len(part.encode()) / len(text.encode()) - fraction) < 0.1


def test_documents_begin_again_at_any_of_their_positions(tmp_path: Path) -> None:
    lines = tmp_path / "b.jsonl"
    lines.write_text("\n".join(json.dumps({"text": f"text {number}"}) + "\n" * (number % 3) for number in range(9)))
    (tmp_path / "c.txt").write_text("last")
    paths = [write(tmp_path, "txt", "first"), lines, tmp_path / "c.txt"]
    whole = read(paths)
    texts = [pieces_of(document) for document in whole]
    assert [text for (text,) in texts] == ["first", *(f"text {number}" for number in range(9)), "last"]
    for number, document in enumerate(whole):
        again = read(paths, document.position)
        assert [pieces_of(found) for found in again] == texts[number:]
        assert [found.name for found in again] == [found.name for found in whole[number:]]
        assert [pieces_of(found) for found in read(paths, document.after)] == texts[number + 1 :]
    assert whole[-1].disk_stop == sum(path.stat().st_size for path in paths)
    inside = replace(whole[3].position, inside=2)
    assert pieces_of(read(paths, inside)[0]) == ["xt 2"]


def test_not_utf8_names_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    for repeats in (10, 100):  # held in memory, and read as a stream
        path.write_bytes(b"abc\n" * repeats + b"caf\xe9 au lait\n" + b"abc\n" * repeats)
        (document,) = read([path])
        with pytest.raises(BadDocument, match=rf"latin\.txt: is not UTF-8: bad byte at offset {repeats * 4 + 3}"):
            list(document.blocks())
    path.write_bytes("é".encode() * 200 + b"\xc3")  # a character that is cut short at the end
    with pytest.raises(BadDocument, match="offset 400"):
        list(read([path])[0].blocks())
    lines = b'{"text": "good"}\n{"text": "b\xe9d"}\n'
    (tmp_path / "a.jsonl").write_bytes(lines)
    good, bad = read([tmp_path / "a.jsonl"])
    assert pieces_of(good) == ["good"]
    with pytest.raises(BadDocument, match=rf"a\.jsonl:2: .* offset {lines.index(0xE9)}"):
        bad.held()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": ', "no JSON"),
        ("[1, 2]", "string under 'text'"),
        ('{"txt": "a"}', "string under 'text'"),
        ('{"text": 3}', "string under 'text'"),
        ('{"text": "\\ud800"}', "surrogate"),
        ('{"text": "' + "x" * 300 + '"}', "longer than 300 bytes.*a file of its own"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 300)
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "good"}}\n\n{line}\n{{"text": "good too"}}\n')
    good, bad, last = read([path])
    with pytest.raises(BadDocument, match=words) as error:
        bad.held()
    assert "a.jsonl:3" in str(error.value)
    assert (good.held(), last.held()) == (b"good", b"good too"), "what comes after it can be read"
    assert pieces_of(read([path], bad.after)[0]) == ["good too"]


def test_files_that_are_no_text(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none.txt", "cannot be read"), (tmp_path, "is a folder")):
        with pytest.raises(DataError, match=words):
            look_at(path)


def test_the_standard_library_is_a_corpus() -> None:
    files = python_standard_library_files()
    assert len(files) > 300 and sum(file.stat().st_size for file in files) > 5_000_000
    assert files == python_standard_library_files() == list(dict.fromkeys(files))
    assert all(file.suffix == ".py" and "site-packages" not in file.parts for file in files)
    assert any(file.name == "argparse.py" for file in files)
    assert not any(file.parent.name == "test" for file in files)
