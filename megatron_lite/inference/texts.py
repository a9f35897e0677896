"""What is evaluated: text files and token files as streams of tokens, and how many bytes of text they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from megatron_lite.config.files import pair_paths
from megatron_lite.data import DataError, IndexedReader
from megatron_lite.data.documents import Document, iter_documents
from megatron_lite.data.sources import look_at
from megatron_lite.data.tokenizer import as_continuation, as_plain_text
from megatron_lite.train.corpus import tokens_per_byte

CHUNK_TOKENS = 1 << 18
WHOLE = (0.0, 1.0)
NO_TOKENIZER = "no tokenizer to decode the tokens with"

Stream = Iterator[NDArray[np.int64]]


@dataclass
class Text:
    """One file to evaluate.

    Its streams are read once, one after the other and each to its end. What has been read so far: documents,
    num_tokens (of the text: without what is put in front of a stream), progress (bytes of a text file, tokens of a
    token file; of size). text_bytes: in UTF-8, final when all is read; None where it is unknown: no_bytes says why.
    """

    name: str
    size: int
    documents: int = 0
    num_tokens: int = 0
    progress: int = 0
    text_bytes: int | None = 0
    no_bytes: str = ""

    def streams(self) -> Iterator[Stream]:
        """Each stream in pieces of int64 ``[n]``: one a document, or one in all where documents are not isolated."""
        raise NotImplementedError


def is_token_file(file: str) -> bool:
    return file.endswith((".bin", ".idx")) or all(path.is_file() for path in pair_paths(file))


def open_text(
    file: str,
    *,
    tokenizer: Tokenizer | None,
    prefix: int | None,
    end: int | None,
    vocab_size: int,
    isolate: bool,
    text_key: str,
    fractions: tuple[float, float] = WHOLE,
) -> Text:
    """A token file (the prefix of a .bin/.idx pair) or a text file, whichever is there.

    fractions: of a token file with D documents, those from round(low * D) to round(high * D), as `TokenDataset` has it.
    prefix: the token that the first token of a stream is predicted from; None: it is not predicted. end: what stands
    between two documents of a text file that are not isolated; None: nothing.

    Raises DataError for a file that is missing or broken; what is wrong inside of a text is raised as it is read.
    """
    if is_token_file(file):
        return TokenFile(file, tokenizer, prefix, vocab_size, isolate, fractions)
    if not Path(file).exists():
        raise DataError(
            f"{file}: no such file; name a text file, or the prefix of a .bin/.idx pair (the path without .bin)"
        )
    if tokenizer is None:
        raise DataError(f"{file}: is text, and there is no tokenizer to make tokens of it; name one with --tokenizer")
    return TextFile(file, tokenizer, prefix, end, isolate, text_key)


class TextFile(Text):
    """A text file of one document, or a file of many. The last one does not end with a token of its own."""

    def __init__(
        self, file: str, tokenizer: Tokenizer, prefix: int | None, end: int | None, isolate: bool, text_key: str
    ) -> None:
        self._file = look_at(file)
        super().__init__(file, self._file.disk_bytes)
        self._prefix, self._end = prefix, end
        self._isolate, self._text_key = isolate, text_key
        self._tokenizer = as_plain_text(tokenizer)
        inside = as_continuation(tokenizer)
        self._inside = as_plain_text(tokenizer if inside is None else inside)

    def streams(self) -> Iterator[Stream]:
        documents = iter_documents([self._file], self._text_key)
        if self._isolate:
            for document in documents:
                yield with_prefix(self._prefix, self._encode(document))
        else:
            yield with_prefix(self._prefix, self._joined(documents))

    def _joined(self, documents: Iterable[Document]) -> Stream:
        for document in documents:
            has_others = self.documents > 0
            for piece in self._encode(document):
                if has_others and self._end is not None:
                    self.num_tokens += 1
                    yield np.array([self._end])
                has_others = False
                yield piece

    def _encode(self, document: Document) -> Stream:
        """The tokens of a document. One without text gives none, and is not counted, as in `megatron-lite data`."""
        assert self.text_bytes is not None
        tokenizer = self._tokenizer
        for piece in document.pieces():
            self.documents += tokenizer is self._tokenizer
            ids = np.array(tokenizer.encode(piece.decode(), add_special_tokens=False).ids, dtype=np.int64)
            self.text_bytes += len(piece)
            self.num_tokens += len(ids)
            self.progress = min(self.progress + len(piece), document.disk_stop)
            yield ids
            tokenizer = self._inside
        self.progress = document.disk_stop


class TokenFile(Text):
    """A .bin/.idx pair: the tokens as they are, with the ends of documents that are in it."""

    def __init__(
        self,
        file: str,
        tokenizer: Tokenizer | None,
        prefix: int | None,
        vocab_size: int,
        isolate: bool,
        fractions: tuple[float, float],
    ) -> None:
        self._reader = IndexedReader(file)
        if self._reader.dtype.kind not in "iu":
            raise DataError(f"{self._reader.idx_path}: holds {self._reader.dtype.name} values, tokens must be integers")
        self._chosen = range(*(round(part * self._reader.num_documents) for part in fractions))
        first, stop = (self._reader.document_start(place) for place in (self._chosen.start, self._chosen.stop))
        name = file if fractions == WHOLE else f"{file}, documents {self._chosen.start:,} to {self._chosen.stop - 1:,}"
        super().__init__(name, stop - first)
        self._prefix, self._vocab_size, self._isolate = prefix, vocab_size, isolate
        known = tokens_per_byte([file]) if fractions == WHOLE else None
        self._decoder = tokenizer if known is None else None
        if known is not None:
            self.text_bytes = round(self._reader.num_tokens / known)
        elif tokenizer is None:
            self.text_bytes, self.no_bytes = None, NO_TOKENIZER

    def streams(self) -> Iterator[Stream]:
        if self._isolate:
            for document in self._chosen:
                yield with_prefix(self._prefix, self._document(document))
        else:
            pieces = (piece for document in self._chosen for piece in self._document(document))
            yield with_prefix(self._prefix, pieces)

    def _document(self, document: int) -> Stream:
        start, stop = self._reader.document_start(document), self._reader.document_start(document + 1)
        if self._decoder is not None and self.text_bytes is not None:
            ids = self._read(start, stop).tolist()
            self.text_bytes += len(self._decoder.decode(ids, skip_special_tokens=True).encode())
        self.documents += 1
        for first in range(start, stop, CHUNK_TOKENS):
            piece = self._read(first, min(first + CHUNK_TOKENS, stop))
            self.num_tokens, self.progress = self.num_tokens + len(piece), self.progress + len(piece)
            yield piece

    def _read(self, start: int, stop: int) -> NDArray[np.int64]:
        tokens = self._reader.read(start, stop - start).astype(np.int64)
        outside = np.flatnonzero((tokens < 0) | (tokens >= self._vocab_size))
        if len(outside):
            place = int(outside[0])
            raise DataError(
                f"{self._reader.bin_path}: token {start + place:,} has the id {int(tokens[place])}, and the model has "
                f"only {self._vocab_size} (0 .. {self._vocab_size - 1}); make the file with the tokenizer of this model"
            )
        return tokens


def with_prefix(prefix: int | None, pieces: Iterable[NDArray[np.int64]]) -> Stream:
    """The pieces behind the token ``prefix``, unless they begin with it."""
    is_first = True
    for piece in pieces:
        if is_first and len(piece) and prefix is not None and piece[0] != prefix:
            yield np.array([prefix])
        is_first = is_first and not len(piece)
        yield piece


def text_prefix(tokenizer: Tokenizer | None, end_ids: tuple[int, ...]) -> int | None:
    """What a model has in front of the first token of a text.

    The token that the tokenizer puts there by itself (Llama's <s>), else the one that ends the document before.
    """
    if tokenizer is not None:
        plain = tokenizer.encode("a", add_special_tokens=False).ids
        marked = tokenizer.encode("a", add_special_tokens=True).ids
        if len(marked) > len(plain) and marked[1 : 1 + len(plain)] == plain:
            return marked[0]
    return end_ids[0] if end_ids else None
