"""Megatron-Core's token files: `PREFIX.bin` holds the tokens, `PREFIX.idx` says where sequences and documents begin.

The index, little-endian, without padding (megatron/core/datasets/indexed_dataset.py in NVIDIA/Megatron-LM):

    9 bytes     b"MMIDIDX\\0\\0"
    uint64      version, 1
    uint8       dtype code of the tokens: uint8 1, int8 2, int16 3, int32 4, int64 5, float64 6, float32 7, uint16 8
    uint64      N, the number of sequences
    uint64      D + 1, the number of document indices
    int32[N]    tokens in each sequence
    int64[N]    byte at which each sequence begins in the .bin
    int64[D+1]  sequence at which each document begins, and N at the end

A multimodal index has int8[N] after that; it is left unread.
"""

from __future__ import annotations

import os
import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_lite.config.files import pair_paths
from megatron_lite.utils.files import AtomicFile, DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
# Megatron-Core's bound, a little under 2**16: vocabularies get padded after the tokens are written.
UINT16_VOCAB_LIMIT = 65500
MAX_SEQUENCE_TOKENS = 2**31 - 1  # lengths are int32
_CHECK_BLOCK = 1 << 20  # sequences checked at a time, so that opening a large index stays small in memory


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype that Megatron-Core stores tokens of this vocabulary in: uint16 below 65,500, else int32."""
    return DTYPES[8] if vocab_size < UINT16_VOCAB_LIMIT else DTYPES[4]


def _code_of(dtype: np.dtype[Any]) -> int:
    for code, known in DTYPES.items():
        if known == dtype:
            return code
    raise DataError(f"dtype {dtype} cannot be stored in a .bin file; use one of {[str(d) for d in DTYPES.values()]}")


def write_index(file: AtomicFile, dtype: np.dtype[Any], lengths: NDArray[Any], documents: NDArray[Any]) -> None:
    """Write the .idx of a .bin whose sequences lie one after the other.

    lengths [N]: tokens in each sequence. documents [D + 1]: sequence at which each document begins, and N.
    """
    pointers = np.zeros(len(lengths), dtype="<i8")
    np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
    file.write(HEADER.pack(MAGIC, VERSION, _code_of(dtype), len(lengths), len(documents)))
    file.write(lengths.astype("<i4").tobytes())
    file.write((pointers * dtype.itemsize).tobytes())
    file.write(documents.astype("<i8").tobytes())


class IndexedWriter:
    """Writes one `.bin`/`.idx` pair, byte for byte what Megatron-Core writes.

        with IndexedWriter("corpus/train", np.uint16) as writer:
            writer.add_document(tokens)

    Both files have temporary names until the block ends well; otherwise neither remains, and a pair that was
    there before is untouched.

    Raises:
        DataError: an unsupported dtype, a token that the dtype cannot hold, or a disk that is full.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: Any) -> None:
        self.bin_path, self.idx_path = pair_paths(prefix)
        self.dtype: np.dtype[Any] = np.dtype(dtype).newbyteorder("<")
        self.num_tokens = 0
        _code_of(self.dtype)  # raises now rather than when all is written
        self._lengths = array("i")  # arrays: a list of a billion Python integers would not fit
        self._documents = array("q", [0])
        self._open_tokens = 0
        self._bin = AtomicFile(self.bin_path)
        self._idx: AtomicFile | None = None

    @property
    def num_documents(self) -> int:
        return len(self._documents) - 1

    def append(self, tokens: Sequence[int] | NDArray[Any]) -> None:
        """Add tokens [n] to the document that is being written; `end_document` closes it."""
        values = np.asarray(tokens)
        if values.size == 0:
            return
        stored = values.astype(self.dtype)
        if values.dtype != self.dtype and not np.array_equal(stored, values):
            wrong = values[stored != values][0]
            raise DataError(f"{self.bin_path}: token id {wrong} does not fit into {self.dtype}; use a wider dtype")
        for part in np.split(stored, self._sequence_cuts(len(stored))):
            if self._open_tokens + len(part) > MAX_SEQUENCE_TOKENS:
                self._end_sequence()
            self._bin.write(part.tobytes())
            self._open_tokens += len(part)
        self.num_tokens += len(stored)

    def end_document(self) -> None:
        """Close the document; one of no tokens is recorded as an empty sequence."""
        self._end_sequence()
        self._documents.append(len(self._lengths))

    def add_document(self, tokens: Sequence[int] | NDArray[Any]) -> None:
        """Add a whole document of tokens [n]."""
        self.append(tokens)
        self.end_document()

    def finish(self) -> None:
        """Bring both files to the disk under their temporary names."""
        assert self._open_tokens == 0, "end_document is missing"
        self._bin.finish()
        self._idx = AtomicFile(self.idx_path)
        write_index(self._idx, self.dtype, np.asarray(self._lengths), np.asarray(self._documents))
        self._idx.finish()

    def commit(self) -> None:
        """Rename both files into place."""
        if self._idx is None:
            self.finish()
        assert self._idx is not None
        # Without its index a .bin cannot be opened, so at no moment does an old index describe a new .bin.
        self.idx_path.unlink(missing_ok=True)
        self._bin.commit()
        self._idx.commit()

    def abort(self) -> None:
        """Remove both temporary files."""
        self._bin.abort()
        if self._idx is not None:
            self._idx.abort()

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
            return
        try:
            self.commit()
        except BaseException:
            self.abort()
            raise

    def _end_sequence(self) -> None:
        self._lengths.append(self._open_tokens)
        self._open_tokens = 0

    def _sequence_cuts(self, count: int) -> list[int]:
        room = MAX_SEQUENCE_TOKENS - self._open_tokens
        return list(range(room, count, MAX_SEQUENCE_TOKENS))


class IndexedReader:
    """One memory-mapped `.bin`/`.idx` pair, read as a single stream of tokens in the order of its sequences.

    Raises:
        DataError: a file is missing, empty, truncated (with the bytes expected and found), of another kind
            or of an unsupported dtype, or its index contradicts itself.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.bin_path, self.idx_path = pair_paths(prefix)
        idx_bytes = _size_of(self.idx_path)
        bin_bytes = _size_of(self.bin_path)
        self.dtype, num_sequences, num_indices = self._read_header(idx_bytes)
        index = np.memmap(self.idx_path, mode="r", dtype=np.uint8).view(np.ndarray)
        ends = np.cumsum([HEADER.size, 4 * num_sequences, 8 * num_sequences, 8 * num_indices]).tolist()
        self.sequence_lengths: NDArray[np.int32] = index[ends[0] : ends[1]].view("<i4")
        self.sequence_pointers: NDArray[np.int64] = index[ends[1] : ends[2]].view("<i8")
        self.document_indices: NDArray[np.int64] = index[ends[2] : ends[3]].view("<i8")
        # Megatron's own files have no jumps and need no table. One made by hand may reorder or share sequences.
        self.num_tokens, self.is_contiguous, needed_bytes = self._check_sequences()
        self._check_documents()
        if self.num_tokens == 0:
            raise DataError(f"{self.bin_path}: holds no tokens; make it again with `megatron-lite data`")
        if bin_bytes < needed_bytes:
            raise DataError(
                f"{self.bin_path}: truncated: its index expects {needed_bytes:,} bytes, found {bin_bytes:,}; "
                "copy it again, or make it again with `megatron-lite data`"
            )
        whole = bin_bytes // self.dtype.itemsize
        self.tokens: NDArray[Any] = np.memmap(self.bin_path, self.dtype, "r", shape=(whole,)).view(np.ndarray)
        self._starts: NDArray[np.int64] | None = None
        if not self.is_contiguous:
            self._starts = np.zeros(num_sequences + 1, dtype=np.int64)
            np.cumsum(self.sequence_lengths, dtype=np.int64, out=self._starts[1:])

    @property
    def num_sequences(self) -> int:
        return len(self.sequence_lengths)

    @property
    def num_documents(self) -> int:
        # A builder that was never told that its last document ended leaves the closing index out.
        closed = int(self.document_indices[-1]) == self.num_sequences
        return len(self.document_indices) - closed

    def document_start(self, document: int) -> int:
        """Position in the stream of the first token of document 0 <= `document` <= num_documents."""
        if document == self.num_documents:
            return self.num_tokens
        return self._sequence_start(int(self.document_indices[document]))

    def document_starts(self) -> NDArray[np.int64]:
        """Positions in the stream at which documents begin that have tokens, rising strictly, int64 [at most D]."""
        starts = np.empty(self.num_documents, dtype=np.int64)
        for first in range(0, len(starts), _CHECK_BLOCK):
            sequences = self.document_indices[first : min(first + _CHECK_BLOCK, len(starts))].astype(np.int64)
            starts[first : first + len(sequences)] = self._sequence_starts(sequences)
        begins = np.diff(starts, append=self.num_tokens) > 0
        return starts if begins.all() else starts[begins]

    def document(self, document: int) -> NDArray[Any]:
        """The tokens [n] of one document, in the dtype of the file."""
        start = self.document_start(document)
        return self.read(start, self.document_start(document + 1) - start)

    def read(self, start: int, count: int) -> NDArray[Any]:
        """Tokens [count] from position `start` of the stream, in the file's dtype; a view where the file allows it."""
        assert start >= 0 <= count and start + count <= self.num_tokens, (start, count, self.num_tokens)
        if self._starts is None:
            return self.tokens[start : start + count]
        return np.concatenate([self.tokens[:0], *self._spans(start, start + count)])

    def _spans(self, start: int, stop: int) -> Iterator[NDArray[Any]]:
        sequence = bisect_right(range(self.num_sequences), start, key=self._sequence_start) - 1
        while start < stop:
            end = min(stop, self._sequence_start(sequence + 1))
            byte = int(self.sequence_pointers[sequence])
            first = byte // self.dtype.itemsize + start - self._sequence_start(sequence)
            yield self.tokens[first : first + end - start]
            start, sequence = end, sequence + 1

    def _sequence_start(self, sequence: int) -> int:
        if self._starts is not None:
            return int(self._starts[sequence])
        if sequence == self.num_sequences:
            return self.num_tokens
        return int(self.sequence_pointers[sequence]) // self.dtype.itemsize

    def _sequence_starts(self, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        """`_sequence_start` of rising numbers of sequences, int64 [n], at most `_CHECK_BLOCK` documents of them."""
        if self._starts is not None:
            return self._starts[sequences]
        first = int(sequences[0])
        pointers = self.sequence_pointers[first : int(sequences[-1]) + 1].astype(np.int64)
        starts = np.append(pointers // self.dtype.itemsize, self.num_tokens)
        return starts[sequences - first]

    def _read_header(self, idx_bytes: int) -> tuple[np.dtype[Any], int, int]:
        with self.idx_path.open("rb") as file:
            header = file.read(HEADER.size)
        if header[: len(MAGIC)] != MAGIC[: len(header)]:
            raise DataError(
                f"{self.idx_path}: is not an index of token files: it begins with {header[: len(MAGIC)]!r}, "
                f"expected {MAGIC!r}; make the pair with `megatron-lite data`"
            )
        if len(header) < HEADER.size:
            raise self._truncated(HEADER.size, idx_bytes)
        _, version, code, num_sequences, num_indices = HEADER.unpack(header)
        if version != VERSION:
            raise DataError(f"{self.idx_path}: version {version} of the format, only version {VERSION} is known")
        if code not in DTYPES:
            raise DataError(
                f"{self.idx_path}: dtype code {code} is unsupported, the codes are "
                f"{', '.join(f'{known} ({dtype.name})' for known, dtype in DTYPES.items())}"
            )
        expected = HEADER.size + 12 * num_sequences + 8 * num_indices
        if idx_bytes < expected:
            raise self._truncated(expected, idx_bytes)
        return DTYPES[code], num_sequences, num_indices

    def _truncated(self, expected: int, found: int) -> DataError:
        return DataError(
            f"{self.idx_path}: truncated: expected {expected:,} bytes, found {found:,}; "
            "copy it again, or make it again with `megatron-lite data`"
        )

    def _check_sequences(self) -> tuple[int, bool, int]:
        """Tokens in all sequences, whether they lie one after the other from byte 0, and the bytes that they need."""
        num_tokens, contiguous, needed_bytes = 0, True, 0
        for first in range(0, self.num_sequences, _CHECK_BLOCK):
            lengths = self.sequence_lengths[first : first + _CHECK_BLOCK].astype(np.int64)
            pointers = self.sequence_pointers[first : first + _CHECK_BLOCK].astype(np.int64)
            if lengths.min() < 0 or pointers.min() < 0 or np.any(pointers % self.dtype.itemsize):
                raise DataError(
                    f"{self.idx_path}: damaged: a negative length, or a pointer that is no multiple of the "
                    f"{self.dtype.itemsize} bytes of a token; make it again with `megatron-lite data`"
                )
            ends = pointers + lengths * self.dtype.itemsize
            contiguous &= int(pointers[0]) == num_tokens * self.dtype.itemsize and np.array_equal(
                pointers[1:], ends[:-1]
            )
            num_tokens += int(lengths.sum())
            needed_bytes = max(needed_bytes, int(ends.max()))
        return num_tokens, contiguous, needed_bytes

    def _check_documents(self) -> None:
        documents, steps = self.document_indices, True
        for first in range(0, len(documents), _CHECK_BLOCK):
            block = documents[first : first + _CHECK_BLOCK + 1]
            steps &= bool(np.all(block[1:] >= block[:-1]))
        if not (steps and len(documents) and documents[0] == 0 and documents[-1] <= self.num_sequences):
            raise DataError(
                f"{self.idx_path}: damaged: document indices must rise from 0 to at most the number of sequences "
                f"({self.num_sequences:,}); make it again with `megatron-lite data`"
            )


def _size_of(path: Path) -> int:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file; make the pair from text with `megatron-lite data`, or correct the prefix "
            "(the path without .bin or .idx)"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if size == 0:
        raise DataError(f"{path}: is empty (0 bytes); make it again with `megatron-lite data`")
    return size
