"""Samples of S + 1 tokens out of memory-mapped token files."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    ) -> None:
        assert seq_len >= 1, seq_len
        if isinstance(prefixes, str):
            prefixes = [prefixes]
        if not prefixes:
            raise DataError("no token files are given; name the prefix of a .bin/.idx pair in data.train or data.valid")
        self.seq_len = seq_len
        self.isolate_documents = isolate_documents
        self.vocab_size = vocab_size
        self.readers = [IndexedReader(prefix) for prefix in prefixes]
        for reader in self.readers:
            if reader.dtype.kind not in "iu":
                raise DataError(f"{reader.idx_path}: holds {reader.dtype.name} values, tokens must be integers")
        self._offsets = [0]  # where each file begins in the stream, and the total
        for reader in self.readers:
            self._offsets.append(self._offsets[-1] + reader.num_tokens)
        if len(self) == 0:
            names = ", ".join(str(reader.bin_path) for reader in self.readers)
            raise DataError(
                f"{names}: {self.num_tokens:,} tokens are too few for one sample of seq_len {seq_len}, which needs "
                f"{seq_len + 1:,}; give more text, or set train.seq_len to at most {max(1, self.num_tokens - 1):,}"
            )

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
        start = index * self.seq_len
        tokens = self._tokens(start, self.seq_len + 1)
        if self.vocab_size is not None and not _within(tokens, self.vocab_size):
            raise self._outside(start, tokens, self.vocab_size)
        if not self.isolate_documents:
            return Sample(tokens)
        return Sample(tokens, *self._documents(start))

    def check_token_ids(self, vocab_size: int) -> None:
        """Read every token once and raise at the first id outside 0 .. vocab_size - 1.

        Raises:
            DataError: naming file, position in the file's stream, id and vocabulary size.
        """
        for first in range(0, self.num_tokens, _SCAN_TOKENS):
            for piece in self._pieces(first, min(_SCAN_TOKENS, self.num_tokens - first)):
                if not _within(piece, vocab_size):
                    block = self._tokens(first, min(_SCAN_TOKENS, self.num_tokens - first))
                    raise self._outside(first, block, vocab_size)

    def _pieces(self, start: int, count: int) -> list[NDArray[Any]]:
        """The stream's tokens start .. start + count - 1, file by file, not copied."""
        pieces, stop = [], start + count
        file = self._file_of(start)
        while start < stop:
            end = min(stop, self._offsets[file + 1])
            pieces.append(self.readers[file].read(start - self._offsets[file], end - start))
            start, file = end, file + 1
        return pieces

    def _tokens(self, start: int, count: int) -> NDArray[np.int64]:
        pieces = self._pieces(start, count)
        return (pieces[0] if len(pieces) == 1 else np.concatenate(pieces)).astype(np.int64)

    def _file_of(self, position: int) -> int:
        return bisect_right(self._offsets, position) - 1

    def _documents(self, start: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        begins = np.zeros(self.seq_len, dtype=bool)
        stop = start + self.seq_len
        for file in range(self._file_of(start), len(self.readers)):
            reader, offset = self.readers[file], self._offsets[file]
            if offset >= stop:
                break
            for document in range(reader.document_at(max(0, start - offset)), reader.num_documents):
                begin = offset + reader.document_start(document)
                if begin >= stop:
                    break
                # A document that began in an earlier sample counts from this sample's first token.
                begins[max(begin, start) - start] = True
        places = np.arange(self.seq_len, dtype=np.int64)
        positions = places - np.maximum.accumulate(np.where(begins, places, 0))
        return (np.cumsum(begins) - 1).astype(np.int32), positions

    def _outside(self, start: int, tokens: NDArray[np.int64], vocab_size: int) -> DataError:
        place = start + int(np.flatnonzero((tokens < 0) | (tokens >= vocab_size))[0])
        file = self._file_of(place)
        return DataError(
            f"{self.readers[file].bin_path}: token {place - self._offsets[file]:,} has the id "
            f"{int(tokens[place - start])}, outside a vocabulary of {vocab_size} (0 .. {vocab_size - 1}); "
            "set model.vocab_size to that of the tokenizer that made the file, or make the file again with this one"
        )


def _within(tokens: NDArray[Any], vocab_size: int) -> bool:
    return int(tokens.min()) >= 0 and int(tokens.max()) < vocab_size
