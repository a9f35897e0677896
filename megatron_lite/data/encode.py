"""From parts of documents to token ids: batches are encoded on all cores while the next ones are being read.

Much text is encoded in processes of their own (encode_workers.py), little text in this one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from megatron_lite.data.documents import Position
from megatron_lite.data.encode_worker import encode_pieces
from megatron_lite.data.encode_workers import Workers
from megatron_lite.data.splits import SPLITS, TRAIN, Part, Skipped
from megatron_lite.data.tokenizer import as_continuation, as_plain_text
from megatron_lite.utils.files import DataError

BATCH_BYTES = 1 << 19  # a token takes some hundred bytes while the tokenizers library holds it
BATCH_PIECES = 1 << 14  # an encoding costs about a kilobyte beside its tokens, which tells where documents are short
# So many batches are encoded at a time in this process: where one has too few pieces left for all cores, the next one
# has some.
_BATCHES_AT_ONCE = 2


@dataclass
class Batch:
    """Pieces of text in order, and where reading goes on after them.

    split, ends: of each piece, where it goes, and whether its document ends with it. begins: whether it begins with
    it. held_out: the text of valid and test. text_bytes: of each split. disk: what of all files has been read.
    skipped: why documents were left out.
    """

    position: Position
    texts: list[str] = field(default_factory=list)
    split: list[int] = field(default_factory=list)
    begins: list[bool] = field(default_factory=list)
    ends: list[bool] = field(default_factory=list)
    held_out: list[list[bytes]] = field(default_factory=lambda: [[] for _ in SPLITS])
    text_bytes: list[int] = field(default_factory=lambda: [0 for _ in SPLITS])
    disk: int = 0
    skipped: list[str] = field(default_factory=list)

    @property
    def is_full(self) -> bool:
        return sum(self.text_bytes) >= BATCH_BYTES or len(self.texts) >= BATCH_PIECES


@dataclass(frozen=True)
class SplitTokens:
    """tokens [n] of one split of a batch, in its dtype. ends int64 [documents]: tokens up to the end of each."""

    tokens: NDArray[Any]
    ends: NDArray[np.int64]


def read_batches(parts: Iterable[Part | Skipped], start: Position) -> Iterator[Batch]:
    """Batches of the parts; the last one may be without text."""
    batch = Batch(start)
    for part in parts:
        document = part.document
        if isinstance(part, Skipped):
            batch.skipped.append(part.reason)
            batch.position, batch.disk = document.after, document.disk_stop
            continue
        position, done = document.position, document.start
        disk_bytes = document.disk_stop - document.disk_start
        begins, rest = part.begins, document.pieces(part.held)
        piece = next(rest)
        while piece:
            following = next(rest, b"")
            done += len(piece)
            batch.texts.append(piece.decode("utf-8"))
            batch.split.append(part.split)
            batch.begins.append(begins)
            batch.ends.append(not following)
            batch.text_bytes[part.split] += len(piece)
            if part.split != TRAIN:
                batch.held_out[part.split].append(piece)
            # A document that is divided goes on in another split where this part of it ends.
            goes_on = bool(following) or done < part.size
            batch.position = replace(position, inside=done) if goes_on else document.after
            batch.disk = document.disk_start + disk_bytes * done // part.size
            if batch.is_full:
                yield batch
                batch = Batch(batch.position, disk=batch.disk)
            begins, piece = False, following
    yield batch


class Encoder:
    """Encodes batches into ids of `dtype`, each document with the id `end` behind it.

    Text that reads like a special token is encoded as text. Truncation and padding of the tokenizer are ignored.
    """

    def __init__(self, tokenizer: Tokenizer, end: int, dtype: np.dtype[Any], num_workers: int = 0) -> None:
        """num_workers: processes that `run` starts; without any, it encodes in this one, on all cores."""
        self._dtype = dtype
        self._end = np.array([end], dtype)
        self._tokenizer = as_plain_text(tokenizer)
        continuation = as_continuation(tokenizer)
        self._continuation = None if continuation is None else as_plain_text(continuation)
        self._workers = Workers(num_workers, self._tokenizer, self._continuation, dtype) if num_workers else None

    def run(self, batches: Iterable[Batch], sink: Callable[[Batch, list[SplitTokens]], None]) -> None:
        """Give every batch and its tokens to `sink`, in order.

        When `batches` raises DataError, those before are still encoded, and given.

        Raises:
            DataError: that of `batches`, or a worker was killed.
        """
        pending: deque[tuple[Batch, Future[list[SplitTokens]]]] = deque()
        failures: list[DataError] = []
        at_once = self._workers.count if self._workers else _BATCHES_AT_ONCE
        # The threads only wait for processes, or for the library, which has a thread for each core.
        with ThreadPoolExecutor(at_once, "encode") as pool, self._workers or nullcontext():
            for batch in _until_failure(batches, failures):
                pending.append((batch, pool.submit(self.encode, batch)))
                if len(pending) > at_once:
                    _give(pending, sink)
            while pending:
                _give(pending, sink)
        if failures:
            raise failures[0]

    def encode(self, batch: Batch) -> list[SplitTokens]:
        """The tokens of each split."""
        if self._workers:
            ids, lengths = self._workers.encode(batch.texts, batch.begins)
        else:
            pieces = encode_pieces(self._tokenizer, self._continuation, batch.texts, batch.begins)
            lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
            ids = np.fromiter(chain.from_iterable(pieces), self._dtype, int(lengths.sum()))
        lists: list[list[NDArray[Any]]] = [[ids[:0]] for _ in SPLITS]
        counts, ends = [0 for _ in SPLITS], [list[int]() for _ in SPLITS]
        start = 0
        for split, length, is_end in zip(batch.split, lengths.tolist(), batch.ends, strict=True):
            lists[split].append(ids[start : start + length])
            start += length
            counts[split] += length
            if is_end:
                lists[split].append(self._end)
                counts[split] += 1
                ends[split].append(counts[split])
        return [
            SplitTokens(np.concatenate(lists[split]), np.array(ends[split], dtype=np.int64))
            for split in range(len(SPLITS))
        ]


def _until_failure(batches: Iterable[Batch], failures: list[DataError]) -> Iterator[Batch]:
    try:
        yield from batches
    except DataError as error:
        failures.append(error)


def _give(
    pending: deque[tuple[Batch, Future[list[SplitTokens]]]], sink: Callable[[Batch, list[SplitTokens]], None]
) -> None:
    batch, tokens = pending.popleft()
    sink(batch, tokens.result())
