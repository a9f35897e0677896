"""Every kind of file gives the same documents, and one that is damaged says so."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import zstandard

from megatron_lite.data import DataError, documents
from megatron_lite.data.documents import iter_documents
from megatron_lite.data.sources import look_at

TEXTS = [f"text {number}: é 文字 🙂\n" * (1 + number * 7 % 50) for number in range(600)]
LINES = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in TEXTS).encode()
KINDS = (
    *("jsonl", "ndjson", "json", "jsonl.gz", "jsonl.zst", "JSON.GZ"),
    *("two-members.jsonl.gz", "two-frames.jsonl.zst", "parquet"),
)


def make(folder: Path, kind: str) -> Path:
    path, half = folder / f"corpus.{kind}", len(LINES) // 2
    if kind == "parquet":
        table = arrow.table({"id": [1] * len(TEXTS), "text": TEXTS})
        parquet.write_table(table, path, row_group_size=100, write_page_checksum=True)
    elif kind.startswith("two-members"):
        path.write_bytes(gzip.compress(LINES[:half]) + gzip.compress(LINES[half:]))
    elif kind.startswith("two-frames"):
        path.write_bytes(zstandard.compress(LINES[:half]) + zstandard.compress(LINES[half:]))
    elif kind.lower().endswith(".gz"):
        path.write_bytes(gzip.compress(LINES))
    elif kind.endswith(".zst"):
        path.write_bytes(zstandard.compress(LINES))
    else:
        path.write_bytes(LINES)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_documents(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_PARQUET_ROWS", 32)  # several batches in a row group
    files = [look_at(make(tmp_path, kind))]
    found = list(iter_documents(files))
    assert [document.held() for document in found] == [text.encode() for text in TEXTS]
    assert found[-1].disk_stop == files[0].disk_bytes
    for number in (0, 1, 99, 100, 101, 463, 599):
        again = list(iter_documents(files, start=found[number].after))
        assert [(d.name, d.held()) for d in again] == [(d.name, d.held()) for d in found[number + 1 :]]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(TEXTS).encode()
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes({"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix](text))
    for held_bytes in (1 << 30, 1 << 10):
        monkeypatch.setattr(documents, "HELD_BYTES", held_bytes)
        (document,) = iter_documents([look_at(path)])
        held = document.held()
        assert (held is None) == (held_bytes < len(text))
        assert b"".join(document.pieces(held)) == text


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "two-frames.jsonl.zst", "parquet"])
@pytest.mark.parametrize("damage", ["cut short", "flipped"])
def test_damaged_files(tmp_path: Path, kind: str, damage: str) -> None:
    path = make(tmp_path, kind)
    content = bytearray(path.read_bytes())
    if damage == "cut short":
        del content[len(content) * 3 // 4 :]
    else:
        place = 20300 if kind == "parquet" else len(content) // 2  # within a column of text
        content[place : place + 64] = bytes(255 - byte for byte in content[place : place + 64])
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"is damaged or cut short.*after.*again") as error:
        list(iter_documents([look_at(path)]))  # read, and not understood: a bad line might be met before the checksum
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_the_last_bytes_of_a_zstd_file_count(tmp_path: Path) -> None:
    """zstandard's own reader gives the whole text and no error."""
    path = make(tmp_path, "jsonl.zst")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="is damaged or cut short"):
        list(iter_documents([look_at(path)]))


def test_columns_of_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    words = arrow.array(["a", None, "", "b"])
    columns = {
        "body": words,
        "large": words.cast(arrow.large_string()),
        "dict": words.dictionary_encode(),
        "n": [1] * 4,
    }
    parquet.write_table(arrow.table(columns), path)
    for name in ("body", "large", "dict"):
        assert [d.held() for d in iter_documents([look_at(path)], name)] == [b"a", b"b"]
    with pytest.raises(DataError, match=r"no column 'text'; its columns are body, large, dict, n: .*--text-key"):
        list(iter_documents([look_at(path)]))
    with pytest.raises(DataError, match="'n' holds int64, text is needed"):
        list(iter_documents([look_at(path)], "n"))
    raw = arrow.array([b"good", b"b\xe9d"]).cast(arrow.binary()).view(arrow.string())
    parquet.write_table(arrow.table({"text": raw}), path)
    good, bad = iter_documents([look_at(path)])
    assert good.held() == b"good"
    with pytest.raises(DataError, match=r"a\.parquet row 1: is not UTF-8: bad byte at offset 1"):
        bad.held()


@pytest.mark.parametrize(("kind", "package"), [("parquet", "pyarrow"), ("jsonl.zst", "zstandard")])
def test_a_package_that_is_missing(tmp_path: Path, kind: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path, kind)
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"needs the package {package}.*pip install 'megatron-lite\[data\]'"):
        look_at(path)
