"""From text to token files: split by document, train or load a tokenizer, encode, and write all of it or nothing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from megatron_lite.data.documents import Document, iter_documents
from megatron_lite.data.indexed import IndexedWriter, token_dtype
from megatron_lite.data.tokenizer import (
    end_of_document_id,
    load_tokenizer,
    tokenizer_vocab_size,
    train_tokenizer,
)
from megatron_lite.utils.files import AtomicFile, DataError

BATCH_BYTES = 1 << 22  # text that is encoded at once, spread over the cores by the tokenizers library
BATCH_PIECES = 1 << 16  # an encoding costs about a kilobyte beside its tokens, which tells where documents are short
TOKENIZER_BYTES = 1 << 28  # training text that a new tokenizer is made from, at most
_TRAIN, _VALID, _SKIPPED = 0, 1, 2


@dataclass(frozen=True)
class SplitSummary:
    """One `.bin`/`.idx` pair: its prefix, documents, tokens (ends of documents included), bytes of text in UTF-8."""

    prefix: str
    documents: int
    tokens: int
    text_bytes: int


@dataclass(frozen=True)
class CorpusSummary:
    """What `prepare_corpus` made; `meta.json` holds the same, with paths relative to its folder."""

    tokenizer: str
    vocab_size: int
    dtype: str
    end_of_document_id: int
    seed: int
    valid_fraction: float
    train: SplitSummary
    valid: SplitSummary | None
    valid_text: str | None
    skipped: tuple[str, ...]


def prepare_corpus(
    files: Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    vocab_size: int = 8192,
    valid_fraction: float = 0.05,
    seed: int = 0,
    text_key: str = "text",
    end_token: str | None = None,
    errors: Literal["raise", "skip"] = "raise",
    progress: bool = True,
    console: Console | None = None,
) -> CorpusSummary:
    """Turn text into `train` and `valid` token files, and leave what an evaluation needs beside them.

    Each file is a document; a `.jsonl` file has one a line, under `text_key`. A document belongs to the validation
    split if a hash of its text and the seed falls below `valid_fraction`: copies of a text stay on one side, whatever
    their names and order. Each side gets at least one document; the end of a text that is alone is held out.

    `folder` receives train.bin, train.idx, valid.bin, valid.idx, valid.txt (the validation text as it was),
    tokenizer.json and meta.json. They appear when all of them are complete; after an error there are none of them,
    or those of an earlier run. Text that reads like a special token is encoded as text.

    Args:
        tokenizer: a tokenizer.json or its folder; without it, a byte-level BPE of up to `vocab_size` tokens is
            trained on the first 256 MiB of the training split.
        end_token: what ends a document; by default `<|endoftext|>` or what the tokenizer has in its place.
        errors: with "skip", documents that are no UTF-8 or no valid JSON are left out and listed in the summary.
        progress: show a progress bar on `console` (standard error).

    Raises:
        DataError: no text, a file that cannot be read, a document that is not UTF-8, no space left on the disk.
        ValueError: valid_fraction outside 0 .. 1, a vocabulary below 257, an unknown value of `errors`.
    """
    if not 0 <= valid_fraction < 1:
        raise ValueError(f"valid_fraction is {valid_fraction}, it must lie in 0 <= valid_fraction < 1")
    if errors not in ("raise", "skip"):
        raise ValueError(f"errors is {errors!r}, it must be 'raise' or 'skip'")
    if not files:
        raise DataError("no text files are given; name at least one")
    chosen = load_tokenizer(tokenizer) if tokenizer is not None else None
    columns = (TextColumn("{task.description:>18}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console or Console(stderr=True), disable=not progress) as bar:
        corpus = _Corpus(files, text_key, valid_fraction, seed, errors, bar)
        if chosen is None:
            limit = min(TOKENIZER_BYTES, corpus.text_bytes[_TRAIN])
            task = bar.add_task("training tokenizer", total=limit)
            chosen = train_tokenizer(_training_text(corpus, limit, bar, task), vocab_size)
        end = end_of_document_id(chosen, end_token)
        return _write_corpus(corpus, Path(folder), chosen, end, bar)


def read_summary(folder: str | os.PathLike[str]) -> CorpusSummary:
    """The summary of a folder that `prepare_corpus` made, with paths that can be opened from here.

    Raises:
        DataError: the folder has no meta.json, or one that is damaged.
    """
    path = Path(folder) / "meta.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        splits = {
            name: record[name] and SplitSummary(**{**record[name], "prefix": str(path.parent / record[name]["prefix"])})
            for name in ("train", "valid")
        }
        places = {key: record[key] and str(path.parent / record[key]) for key in ("tokenizer", "valid_text")}
        return CorpusSummary(**{**record, **splits, **places, "skipped": tuple(record["skipped"])})
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; make the folder with `megatron-lite data`") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is damaged ({error}); make the folder again with `megatron-lite data`") from error


class _Corpus:
    """The documents and the split of each, found in a first pass that also checks that every one can be read."""

    def __init__(
        self,
        files: Sequence[str | os.PathLike[str]],
        text_key: str,
        valid_fraction: float,
        seed: int,
        errors: str,
        bar: Progress,
    ) -> None:
        self.seed = seed
        self.valid_fraction = valid_fraction
        self.skipped: list[str] = []
        self.text_bytes = [0, 0]
        self._files = files
        self._text_key = text_key
        self._splits = bytearray()  # one byte a document, so that billions of lines fit
        self._parts: tuple[Document, Document] | None = None
        lowest, highest = (2.0, -1, 0), (-1.0, -1, 0)  # (score, number, bytes) of the extreme documents
        task = bar.add_task("reading text", total=sum(_size_of(file) for file in files))
        for number, document in enumerate(iter_documents(files, text_key)):
            split, score, size = _SKIPPED, 0.0, 0
            try:
                score, size = self._score(document, bar, task)
            except DataError as error:
                if errors == "raise":
                    raise
                self.skipped.append(str(error))
            if size:
                split = _VALID if score < valid_fraction else _TRAIN
                self.text_bytes[split] += size
                lowest, highest = min(lowest, (score, number, size)), max(highest, (score, number, size))
            self._splits.append(split)
        if highest[1] < 0:
            raise DataError(
                f"the {len(files)} files hold no text ({len(self.skipped)} documents were skipped); name others"
            )
        bar.update(task, completed=bar.tasks[task].total)
        self._fill_splits(lowest, highest)

    def __iter__(self) -> Iterator[tuple[int, Document]]:
        """(split, document), in the order of the files, without what was skipped or is empty."""
        if self._parts is not None:
            yield from zip((_TRAIN, _VALID), self._parts, strict=True)
            return
        documents = iter_documents(self._files, self._text_key)
        for split, document in zip(self._splits, documents, strict=True):
            if split != _SKIPPED:
                yield split, document

    def _score(self, document: Document, bar: Progress, task: TaskID) -> tuple[float, int]:
        """A number in 0 .. 1 that depends on the text and the seed, and the size of the text in bytes."""
        digest = hashlib.blake2b(digest_size=8, key=str(self.seed).encode())
        size = 0
        for piece in document.pieces():
            text = piece.encode()
            digest.update(text)
            size += len(text)
            bar.advance(task, len(text))
        # 53 bits: a float holds them exactly, and the quotient stays below 1.
        return (int.from_bytes(digest.digest(), "little") >> 11) / 2**53, size

    def _fill_splits(self, lowest: tuple[float, int, int], highest: tuple[float, int, int]) -> None:
        """Move one document if a split that is asked for got none; divide the document that is alone."""
        if self.valid_fraction == 0 or all(self.text_bytes):
            return
        if lowest[1] != highest[1]:
            full = _TRAIN if self.text_bytes[_TRAIN] else _VALID
            _, number, size = lowest if full == _TRAIN else highest
            self._splits[number] = 1 - full
            self.text_bytes[full] -= size
            self.text_bytes[1 - full] += size
            return
        document = next(document for split, document in self if split != _SKIPPED)
        self._parts = document.split(self.valid_fraction)
        self.text_bytes = [sum(len(piece.encode()) for piece in part.pieces()) for part in self._parts]
        if not all(self.text_bytes):
            raise DataError(f"{document.name}: is too short to hold out {self.valid_fraction} of it; give more text")


def _training_text(corpus: _Corpus, limit: int, bar: Progress, task: TaskID) -> Iterator[str]:
    left = limit
    for split, document in corpus:
        if split != _TRAIN:
            continue
        for piece in document.pieces():
            if left <= 0:
                return
            size = len(piece.encode())
            left -= size
            bar.advance(task, size)
            yield piece


class _Encoder:
    """Collects pieces of documents, encodes a batch of them on all cores, and appends them to their split's writer."""

    def __init__(self, tokenizer: Tokenizer, end: int, writers: Sequence[IndexedWriter], bar: Progress, task: TaskID):
        # A copy: what follows is a matter of this corpus and not of the caller's tokenizer.
        self._tokenizer: Tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._end = end
        self._writers = writers
        self._bar = bar
        self._task = task
        self._pieces: list[str] = []
        self._targets: list[tuple[int, bool]] = []  # (split, whether the document ends here) of each piece
        self._num_bytes = 0

    def add(self, split: int, piece: str, size: int) -> None:
        self._pieces.append(piece)
        self._targets.append((split, False))
        self._num_bytes += size
        if self._num_bytes >= BATCH_BYTES or len(self._pieces) >= BATCH_PIECES:
            self.flush()

    def end_document(self, split: int) -> None:
        """An empty piece that carries the mark: the last piece may be encoded already."""
        self._pieces.append("")
        self._targets.append((split, True))

    def flush(self) -> None:
        encodings = self._tokenizer.encode_batch_fast(self._pieces, add_special_tokens=False)
        for encoding, (split, ends) in zip(encodings, self._targets, strict=True):
            if ends:
                self._writers[split].append([self._end])
                self._writers[split].end_document()
            else:
                self._writers[split].append(encoding.ids)
        self._bar.advance(self._task, self._num_bytes)
        self._pieces, self._targets, self._num_bytes = [], [], 0


def _write_corpus(corpus: _Corpus, folder: Path, tokenizer: Tokenizer, end: int, bar: Progress) -> CorpusSummary:
    vocab_size = tokenizer_vocab_size(tokenizer)
    dtype = token_dtype(vocab_size)
    names = ("train", "valid") if corpus.text_bytes[_VALID] else ("train",)
    with ExitStack() as stack:
        writers: list[IndexedWriter] = []
        for name in names:
            writers.append(IndexedWriter(folder / name, dtype))
            stack.callback(writers[-1].abort)
        texts: dict[int, AtomicFile] = {}
        if len(names) > _VALID:
            texts[_VALID] = AtomicFile(folder / "valid.txt")
            stack.callback(texts[_VALID].abort)
        encoder = _Encoder(tokenizer, end, writers, bar, bar.add_task("encoding", total=sum(corpus.text_bytes)))
        for split, document in corpus:
            for piece in document.pieces():
                text = piece.encode()
                encoder.add(split, piece, len(text))
                if split in texts:
                    texts[split].write(text)
            encoder.end_document(split)
        encoder.flush()
        summaries = [
            SplitSummary(name, writer.num_documents, writer.num_tokens, corpus.text_bytes[split])
            for split, (name, writer) in enumerate(zip(names, writers, strict=True))
        ]
        summary = CorpusSummary(
            tokenizer="tokenizer.json",
            vocab_size=vocab_size,
            dtype=dtype.name,
            end_of_document_id=end,
            seed=corpus.seed,
            valid_fraction=corpus.valid_fraction,
            train=summaries[_TRAIN],
            valid=summaries[_VALID] if texts else None,
            valid_text="valid.txt" if texts else None,
            skipped=tuple(corpus.skipped),
        )
        saved = [
            (AtomicFile(folder / "tokenizer.json"), tokenizer.to_str(pretty=True)),
            (AtomicFile(folder / "meta.json"), json.dumps(asdict(summary), indent=2) + "\n"),
        ]
        for file, content in saved:
            stack.callback(file.abort)
            file.write(content.encode())
        _commit(folder, [*writers, *texts.values(), *(file for file, _ in saved)])
    return read_summary(folder)


def _commit(folder: Path, files: Sequence[IndexedWriter | AtomicFile]) -> None:
    """Bring everything to the disk, then rename; meta.json is last, so a folder that has one is of one piece."""
    for file in files:
        file.finish()
    _remove(folder / name for name in ("meta.json", "valid.txt", "valid.bin", "valid.idx"))
    for file in files:
        file.commit()


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _size_of(path: str | os.PathLike[str]) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise DataError(f"{os.fspath(path)}: cannot be read: {error.strerror}; correct the path") from error
