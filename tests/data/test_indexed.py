"""The pairs on disk against bytes put together by hand from Megatron-Core's description of the format."""

from __future__ import annotations

import errno
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.data import DataError, IndexedReader, IndexedWriter
from megatron_lite.data.indexed import token_dtype
from megatron_lite.utils import files as files_module

STRUCT_LETTERS = {"uint8": "B", "int8": "b", "int16": "h", "int32": "i", "int64": "q", "uint16": "H"}
CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


def oracle(documents: list[list[list[int]]], dtype: str) -> tuple[bytes, bytes]:
    """.bin and .idx of documents, each a list of sequences, with struct alone."""
    letter = STRUCT_LETTERS[dtype]
    sequences = [sequence for document in documents for sequence in document]
    data = b"".join(struct.pack(f"<{len(s)}{letter}", *s) for s in sequences)
    pointers, at = [], 0
    for sequence in sequences:
        pointers.append(at)
        at += struct.calcsize(letter) * len(sequence)
    ends = [0]
    for document in documents:
        ends.append(ends[-1] + len(document))
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", CODES[dtype])
    index += struct.pack("<Q", len(sequences)) + struct.pack("<Q", len(ends))
    index += struct.pack(f"<{len(sequences)}i", *[len(s) for s in sequences])
    index += struct.pack(f"<{len(sequences)}q", *pointers) + struct.pack(f"<{len(ends)}q", *ends)
    return data, index


def write_pair(prefix: Path, data: bytes, index: bytes) -> Path:
    prefix.with_suffix(".bin").write_bytes(data)
    prefix.with_suffix(".idx").write_bytes(index)
    return prefix


def temporary_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", list(CODES))
def test_writer_is_byte_exact(tmp_path: Path, dtype: str) -> None:
    documents = [[5, 6, 7], [100], [], [1, 2, 3, 4, 5, 127]]
    with IndexedWriter(tmp_path / "a", dtype) as writer:
        for document in documents:
            writer.add_document(document)
    data, index = oracle([[document] for document in documents], dtype)
    assert (tmp_path / "a.bin").read_bytes() == data
    assert (tmp_path / "a.idx").read_bytes() == index
    assert temporary_files(tmp_path) == ["a.bin", "a.idx"]
    assert (writer.num_documents, writer.num_tokens) == (4, 10)
    # Negative control: another dtype gives other bytes, so the comparison is not of something constant.
    assert oracle([[document] for document in documents], "int32" if dtype != "int32" else "int64")[1] != index


@pytest.mark.parametrize("dtype", list(CODES))
def test_reader_reads_the_oracle(tmp_path: Path, dtype: str) -> None:
    documents: list[list[list[int]]] = [[[5, 6], [7]], [[8, 9, 10]], [[]], [[11], [12, 13]]]
    reader = IndexedReader(write_pair(tmp_path / "a", *oracle(documents, dtype)))
    assert reader.dtype == np.dtype(dtype)
    assert (reader.num_tokens, reader.num_sequences, reader.num_documents) == (9, 6, 4)
    assert [reader.document(d).tolist() for d in range(4)] == [[5, 6, 7], [8, 9, 10], [], [11, 12, 13]]
    assert reader.read(2, 5).tolist() == [7, 8, 9, 10, 11]
    assert reader.document_starts().tolist() == [0, 3, 6]  # the empty document begins nowhere
    assert np.shares_memory(reader.read(2, 5), reader.tokens), "the corpus is mapped, not copied"


def test_appended_pieces_are_one_document(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "pieces", np.uint16) as writer:
        writer.append([1, 2])
        writer.append(np.array([3]))
        writer.append([])
        writer.end_document()
        writer.add_document([4])
    assert (tmp_path / "pieces.idx").read_bytes() == oracle([[[1, 2, 3]], [[4]]], "uint16")[1]


def test_a_document_longer_than_int32_is_several_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_lite.data.indexed.MAX_SEQUENCE_TOKENS", 4)
    with IndexedWriter(tmp_path / "long", np.uint16) as writer:
        writer.append([0, 1, 2])
        writer.append(list(range(3, 14)))
        writer.end_document()
        writer.add_document([99])
    reader = IndexedReader(tmp_path / "long")
    assert max(reader.sequence_lengths) <= 4
    assert reader.document(0).tolist() == list(range(14))
    assert reader.document(1).tolist() == [99]


def test_sequences_out_of_order_are_read_in_the_order_of_the_index(tmp_path: Path) -> None:
    data, index = oracle([[[1, 2, 3]], [[4, 5]], [[6]]], "uint16")
    start = 34 + 3 * 4
    swapped = index[:start] + struct.pack("<3q", 6, 0, 4) + index[start + 24 :]
    # Lengths 3, 2, 1 at bytes 6, 0 and 4: the second and third read what the first one of the plain index does.
    reader = IndexedReader(write_pair(tmp_path / "swapped", data, swapped))
    assert reader.read(0, 6).tolist() == [4, 5, 6, 1, 2, 3]
    assert reader.read(2, 3).tolist() == [6, 1, 2]
    assert IndexedReader(write_pair(tmp_path / "plain", data, index)).read(0, 6).tolist() == [1, 2, 3, 4, 5, 6]


def test_missing_last_document_index_and_trailing_modes_are_accepted(tmp_path: Path) -> None:
    data, index = oracle([[[1, 2]], [[3]]], "int32")
    count = 17 + 1 + 8
    unfinished = index[:count] + struct.pack("<Q", 2) + index[count + 8 : -8]
    reader = IndexedReader(write_pair(tmp_path / "unfinished", data, unfinished))
    assert [reader.document(d).tolist() for d in range(reader.num_documents)] == [[1, 2], [3]]
    multimodal = IndexedReader(write_pair(tmp_path / "modes", data, index + b"\x00\x01"))
    assert multimodal.read(0, 3).tolist() == [1, 2, 3]


def test_prefix_may_name_either_file(tmp_path: Path) -> None:
    write_pair(tmp_path / "a.v1", *oracle([[[1, 2]]], "int32"))  # a dot in the name is not an extension
    os.rename(tmp_path / "a.bin", tmp_path / "a.v1.bin")
    os.rename(tmp_path / "a.idx", tmp_path / "a.v1.idx")
    for name in ("a.v1", "a.v1.bin", "a.v1.idx"):
        assert IndexedReader(tmp_path / name).num_tokens == 2


def test_dtype_by_vocabulary() -> None:
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == np.int32


GOOD_DATA, GOOD_INDEX = oracle([[[1, 2, 3]], [[4, 5]]], "uint16")


@pytest.mark.parametrize(
    ("data", "index", "words"),
    [
        (None, GOOD_INDEX, ["a.bin", "no such file", "megatron-lite data"]),
        (GOOD_DATA, None, ["a.idx", "no such file", "megatron-lite data"]),
        (b"", GOOD_INDEX, ["a.bin", "empty"]),
        (GOOD_DATA, b"", ["a.idx", "empty"]),
        (GOOD_DATA[:-1], GOOD_INDEX, ["a.bin", "truncated", "expects 10 bytes", "found 9"]),
        (GOOD_DATA, GOOD_INDEX[:-1], ["a.idx", "truncated", "expected 82 bytes", "found 81"]),
        (GOOD_DATA, GOOD_INDEX[:20], ["a.idx", "truncated", "expected 34 bytes", "found 20"]),
        (GOOD_DATA, GOOD_INDEX[:5], ["a.idx", "truncated", "expected 34 bytes", "found 5"]),
        (GOOD_DATA, b"TNTIDX\x00\x00\x00" + GOOD_INDEX[9:], ["a.idx", "TNTIDX", "MMIDIDX"]),
        (GOOD_DATA, GOOD_INDEX[:9] + struct.pack("<Q", 2) + GOOD_INDEX[17:], ["a.idx", "version 2"]),
        (GOOD_DATA, GOOD_INDEX[:17] + b"\x09" + GOOD_INDEX[18:], ["a.idx", "dtype code 9", "8 (uint16)"]),
        (GOOD_DATA, GOOD_INDEX[:18] + struct.pack("<Q", 1 << 60) + GOOD_INDEX[26:], ["a.idx", "truncated"]),
        (GOOD_DATA, GOOD_INDEX[:34] + struct.pack("<i", -3) + GOOD_INDEX[38:], ["a.idx", "damaged", "negative"]),
        (GOOD_DATA, GOOD_INDEX[:-8] + struct.pack("<q", 7), ["a.idx", "damaged", "document"]),
        (GOOD_DATA, GOOD_INDEX[:-16] + struct.pack("<2q", 2, 1), ["a.idx", "damaged", "document"]),
        (GOOD_DATA, oracle([[[]]], "uint16")[1], ["a.bin", "no tokens"]),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path: Path, data: bytes | None, index: bytes | None, words: list[str]) -> None:
    if data is not None:
        (tmp_path / "a.bin").write_bytes(data)
    if index is not None:
        (tmp_path / "a.idx").write_bytes(index)
    with pytest.raises(DataError) as error:
        IndexedReader(tmp_path / "a")
    assert isinstance(error.value, ValueError)
    for word in words:
        assert word in str(error.value)


def test_the_good_pair_of_the_bad_ones_is_good(tmp_path: Path) -> None:
    assert IndexedReader(write_pair(tmp_path / "a", GOOD_DATA, GOOD_INDEX)).read(0, 5).tolist() == [1, 2, 3, 4, 5]


def test_an_id_that_the_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    for bad in (65536, -1):
        with pytest.raises(DataError, match=str(bad)), IndexedWriter(tmp_path / "a", np.uint16) as writer:
            writer.add_document([1, bad])
    assert temporary_files(tmp_path) == []


def test_unsupported_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="uint32"):
        IndexedWriter(tmp_path / "a", np.uint32)
    assert temporary_files(tmp_path) == []


def test_failure_leaves_the_old_pair_and_nothing_else(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", GOOD_DATA, GOOD_INDEX)
    with pytest.raises(KeyboardInterrupt), IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document([9, 9])
        raise KeyboardInterrupt
    assert temporary_files(tmp_path) == ["a.bin", "a.idx"]
    assert (tmp_path / "a.bin").read_bytes() == GOOD_DATA
    assert (tmp_path / "a.idx").read_bytes() == GOOD_INDEX


FILL = """
import resource, sys
import numpy as np
from megatron_lite.data import DataError, IndexedWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    with IndexedWriter(sys.argv[1], np.int32) as writer:
        for _ in range(100):
            writer.add_document(np.arange(1000))
except DataError as error:
    print(error)
    sys.exit(3)
"""


@pytest.mark.parametrize(("limit", "result"), [(100_000, 3), (1_000_000, 0)])
def test_a_file_that_may_not_grow(tmp_path: Path, limit: int, result: int) -> None:
    """The kernel itself refuses the write (a file-size limit: it needs no disk to be filled)."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    command = [sys.executable, "-c", FILL, str(tmp_path / "a"), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == result, done.stderr
    if result:
        assert "a.bin: no space left" in done.stdout and "bytes are free" in done.stdout
    assert temporary_files(tmp_path) == ([] if result else ["a.bin", "a.idx"])


@pytest.mark.parametrize("failing", ["a.bin", "a.idx"])
@pytest.mark.parametrize("moment", ["write", "fsync"])
def test_no_space_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, moment: str) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if moment == "write":
        written = files_module.AtomicFile.write

        def write(self: files_module.AtomicFile, data: bytes) -> None:
            if self.path.name == failing:
                assert self._file is not None
                self._file = _FullFile(self._file, full)  # type: ignore[assignment]
            written(self, data)

        monkeypatch.setattr(files_module.AtomicFile, "write", write)
    else:
        calls: list[int] = []

        def fsync(descriptor: int) -> None:
            calls.append(descriptor)
            if len(calls) == ["a.bin", "a.idx"].index(failing) + 1:
                raise full

        monkeypatch.setattr(files_module.os, "fsync", fsync)
    with pytest.raises(DataError) as error, IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document([1, 2, 3, 4])
    needed = {("a.bin", "write"): 8, ("a.bin", "fsync"): 8, ("a.idx", "write"): 34, ("a.idx", "fsync"): 62}
    assert f"{failing}: no space left" in str(error.value)
    assert f"at least {needed[failing, moment]} bytes" in str(error.value)
    assert "free some space" in str(error.value)
    assert temporary_files(tmp_path) == []


class _FullFile:
    """A file on a disk without space: writes fail, everything else works."""

    def __init__(self, file: object, error: OSError) -> None:
        self._inner, self._error = file, error

    def write(self, data: bytes) -> int:
        raise self._error

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written"):
        IndexedWriter(tmp_path / "file" / "a", np.uint16)
