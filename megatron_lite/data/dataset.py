"""Samples of S + 1 tokens out of memory-mapped token files."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.cache import IndexCache, fingerprint
from megatron_lite.data.index import NO_LIMIT, gather_tokens, mark_documents
from megatron_lite.data.indexed import IndexedReader
from megatron_lite.utils.files import DataError

_SCAN_TOKENS = 1 << 22


@dataclass(frozen=True)
class Sample:
    """One training sample of S inputs and, shifted by one, S targets.

    tokens int64 [S + 1]. document_ids int32 [S]: equal where two inputs belong to the same document, counted from 0
    within the sample; positions int64 [S]: restart at 0 with each document. Both are None unless documents are
    isolated.
    """

    tokens: NDArray[np.int64]
    document_ids: NDArray[np.int32] | None = None
    positions: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class SampleRows:
    """Samples side by side: tokens and targets int64 [B, S]; documents int32 and positions int64 as in `Sample`."""

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    documents: NDArray[np.int32] | None
    positions: NDArray[np.int64] | None

    @classmethod
    def empty(cls, num: int, seq_len: int, isolate_documents: bool) -> SampleRows:
        tokens, targets = np.empty((2, num, seq_len), dtype=np.int64)
        if not isolate_documents:
            return cls(tokens, targets, None, None)
        return cls(tokens, targets, np.empty((num, seq_len), np.int32), np.empty((num, seq_len), np.int64))


class Samples(Protocol):
    """What a loader reads: a `TokenDataset`, or several as a `BlendedDataset`."""

    seq_len: int
    isolate_documents: bool

    def __len__(self) -> int: ...

    def fill(self, ids: NDArray[np.int64], rows: NDArray[np.int64], out: SampleRows) -> None: ...


@dataclass(frozen=True)
class _Piece:
    """A run of whole documents of one file: `num_tokens` tokens from position `first` of the file's stream."""

    reader: IndexedReader
    first: int
    num_tokens: int
    document_starts: NDArray[np.int64] | None  # of the whole file


class TokenDataset:
    """The documents of several `.bin`/`.idx` pairs as one stream of tokens, cut into samples.

    Sample i is tokens i * S .. (i + 1) * S of the stream (S + 1 of them: the last is the target of the one before
    it, and the first input of sample i + 1). There are (total tokens - 1) // S samples. The corpus stays on the disk
    and in the page cache, which all processes of a machine share.

    With `isolate_documents`, a sample also tells its documents apart. The first token of a document is then
    still a target, for the last token of the document before it: the number of targets stays S whatever the text.

    Args:
        prefixes: paths without .bin and .idx, read in this order.
        seq_len: S.
        vocab_size: if given, a sample with a token id outside 0 .. vocab_size - 1 raises when it is read.
        fractions: (low, high): of each pair the documents from round(low * D) to round(high * D), of D.
        cache: where the places at which documents begin are kept, for `isolate_documents`.

    Raises:
        DataError: no prefix, a broken pair (see `IndexedReader`), tokens that are no integers, or fewer than S + 1.
    """

    def __init__(
        self,
        prefixes: Sequence[str | os.PathLike[str]],
        seq_len: int,
        *,
        isolate_documents: bool = False,
        vocab_size: int | None = None,
        fractions: tuple[float, float] = (0.0, 1.0),
        cache: IndexCache | None = None,
    ) -> None:
        assert seq_len >= 1, seq_len
        if isinstance(prefixes, str):
            prefixes = [prefixes]
        if not prefixes:
            raise DataError("no token files are given; name the prefix of a .bin/.idx pair in data.train or data.valid")
        self.seq_len = seq_len
        self.isolate_documents = isolate_documents
        self.vocab_size = vocab_size
        cache = cache or IndexCache(())
        self._pieces = [self._open(IndexedReader(prefix), fractions, cache) for prefix in prefixes]
        self._offsets = [0]  # where each piece begins in the stream, and the total
        for piece in self._pieces:
            self._offsets.append(self._offsets[-1] + piece.num_tokens)
        self._bounds = np.array(self._offsets)
        if len(self) == 0:
            raise self._too_short(fractions)

    def _open(self, reader: IndexedReader, fractions: tuple[float, float], cache: IndexCache) -> _Piece:
        if reader.dtype.kind not in "iu":
            raise DataError(f"{reader.idx_path}: holds {reader.dtype.name} values, tokens must be integers")
        starts = None
        if self.isolate_documents:
            starts = cache.array(
                "documents",
                {"file": str(reader.idx_path.resolve())},
                fingerprint(reader.idx_path),
                reader.document_starts,
                entries=reader.num_documents,
            )
        # As Megatron-Core divides the sequences of a file: the sums of the fractions, times their number, rounded.
        low, high = (reader.document_start(round(part * reader.num_documents)) for part in fractions)
        return _Piece(reader, low, high - low, starts)

    @property
    def readers(self) -> list[IndexedReader]:
        """The files, in the order of the stream."""
        return [piece.reader for piece in self._pieces]

    @property
    def num_tokens(self) -> int:
        """Tokens in all files."""
        return self._offsets[-1]

    def __len__(self) -> int:
        return max(0, self.num_tokens - 1) // self.seq_len

    def __getitem__(self, index: int) -> Sample:
        return self.sample(index)

    def sample(self, index: int) -> Sample:
        """Sample 0 <= `index` < len(self).

        Raises:
            IndexError: no such sample.
            DataError: a token id outside the vocabulary, naming file, position and id.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        rows = SampleRows.empty(1, self.seq_len, self.isolate_documents)
        self.fill(np.array([index]), np.array([0]), rows)
        tokens = np.append(rows.tokens[0], rows.targets[0, -1])
        if rows.documents is None or rows.positions is None:
            return Sample(tokens)
        return Sample(tokens, rows.documents[0], rows.positions[0])

    def fill(self, ids: NDArray[np.int64], rows: NDArray[np.int64], out: SampleRows) -> None:
        """Writes sample ids[n] into row rows[n] of `out`. ids, rows: int64 [num].

        Raises:
            DataError: a token id outside the vocabulary, naming file, position and id.
        """
        starts = ids * self.seq_len
        first = np.searchsorted(self._bounds, starts, side="right") - 1
        last = np.searchsorted(self._bounds, starts + self.seq_len, side="right") - 1
        for number in np.unique(first).tolist():
            piece = self._pieces[number]
            inside = (first == number) & (last == number)
            if piece.reader.is_contiguous and inside.any():
                places = starts[inside] + (piece.first - self._offsets[number])
                self._copy(piece, places, rows[inside], out)
                first[inside] = -1
        for n in np.flatnonzero(first >= 0).tolist():  # across the end of a file, or out of a file with jumps
            self._assemble(int(starts[n]), int(rows[n]), out)

    def check_token_ids(self, vocab_size: int) -> None:
        """Read every token once and raise at the first id outside 0 .. vocab_size - 1.

        Raises:
            DataError: naming file, position in the file's stream, id and vocabulary size.
        """
        for first in range(0, self.num_tokens, _SCAN_TOKENS):
            for piece, place, count in self._spans(first, min(_SCAN_TOKENS, self.num_tokens - first)):
                tokens = piece.reader.read(place, count)
                if not _within(tokens, vocab_size):
                    raise _outside(piece, place, tokens, vocab_size)

    def _copy(self, piece: _Piece, places: NDArray[np.int64], rows: NDArray[np.int64], out: SampleRows) -> None:
        """Samples that lie in one piece of a file without jumps, from these positions of the file's stream."""
        limit = NO_LIMIT if self.vocab_size is None else self.vocab_size
        wrong = gather_tokens(piece.reader.tokens, places, rows, limit, out.tokens, out.targets)
        if self.vocab_size is not None and wrong >= 0:
            tokens = piece.reader.read(int(places[wrong]), self.seq_len + 1)
            raise _outside(piece, int(places[wrong]), tokens, self.vocab_size)
        if out.documents is not None and out.positions is not None and piece.document_starts is not None:
            mark_documents(piece.document_starts, places, rows, out.documents, out.positions)

    def _assemble(self, start: int, row: int, out: SampleRows) -> None:
        """Any sample: that from position `start` of the stream."""
        parts = []
        for piece, place, count in self._spans(start, self.seq_len + 1):
            tokens = piece.reader.read(place, count)
            if self.vocab_size is not None and not _within(tokens, self.vocab_size):
                raise _outside(piece, place, tokens, self.vocab_size)
            parts.append(tokens.astype(np.int64))
        sample = np.concatenate(parts)
        out.tokens[row], out.targets[row] = sample[:-1], sample[1:]
        if out.documents is None or out.positions is None:
            return
        done, document = 0, 0
        for piece, place, count in self._spans(start, self.seq_len):
            assert piece.document_starts is not None
            documents, positions = np.empty((1, count), np.int32), np.empty((1, count), np.int64)
            mark_documents(piece.document_starts, np.array([place]), np.array([0]), documents, positions)
            out.documents[row, done : done + count] = documents[0] + document
            out.positions[row, done : done + count] = positions[0]
            # A file begins with a document of its own.
            done, document = done + count, document + int(documents[0, -1]) + 1

    def _spans(self, start: int, count: int) -> Iterator[tuple[_Piece, int, int]]:
        """Where tokens start .. start + count - 1 of the stream lie: piece, position in the file's stream, number."""
        stop = start + count
        number = bisect_right(self._offsets, start) - 1
        while start < stop:
            piece, offset = self._pieces[number], self._offsets[number]
            end = min(stop, self._offsets[number + 1])
            if end > start:
                yield piece, piece.first + start - offset, end - start
            start, number = max(start, end), number + 1

    def _too_short(self, fractions: tuple[float, float]) -> DataError:
        names = ", ".join(str(reader.bin_path) for reader in self.readers)
        part = "" if fractions == (0.0, 1.0) else f" in the part {fractions[0]:g} .. {fractions[1]:g} of the documents"
        return DataError(
            f"{names}: {self.num_tokens:,} tokens{part} are too few for one sample of seq_len {self.seq_len}, which "
            f"needs {self.seq_len + 1:,}; give more text{', a larger fraction in data.split' if part else ''}"
            + (f", or set train.seq_len to at most {self.num_tokens - 1:,}" if self.num_tokens > 1 else "")
        )


def split_fractions(split: Sequence[float]) -> list[tuple[float, float]]:
    """(low, high) of each part of a split, for `TokenDataset`: its fractions, which have the sum 1, added up."""
    bounds = [0.0, *accumulate(split)]
    bounds[-1] = 1.0  # whatever the rounding: no document is left over
    return list(pairwise(bounds))


def _within(tokens: NDArray[Any], vocab_size: int) -> bool:
    return int(tokens.min()) >= 0 and int(tokens.max()) < vocab_size


def _outside(piece: _Piece, place: int, tokens: NDArray[Any], vocab_size: int) -> DataError:
    first = int(np.flatnonzero((tokens < 0) | (tokens >= vocab_size))[0])
    return DataError(
        f"{piece.reader.bin_path}: token {place + first:,} has the id {int(tokens[first])}, outside a vocabulary of "
        f"{vocab_size} (0 .. {vocab_size - 1}); set model.vocab_size to that of the tokenizer that made the file, or "
        "make the file again with this one"
    )
