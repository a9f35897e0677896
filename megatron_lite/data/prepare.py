"""From text to token files: split by document, train or load a tokenizer, encode, and go on where that was stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tokenizers
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from megatron_lite.data.documents import iter_documents
from megatron_lite.data.encode import Batch, Encoder, SplitTokens, read_batches
from megatron_lite.data.indexed import token_dtype
from megatron_lite.data.partial import Partial, is_being_published
from megatron_lite.data.sources import TextFile, look_at
from megatron_lite.data.splits import SPLITS, TEST, TRAIN, VALID, Skipped, Splits, plan, read_parts
from megatron_lite.data.tokenizer import declared_end, end_of_document_id, load_tokenizer, tokenizer_vocab_size
from megatron_lite.data.tokenizer_training import MIN_VOCAB_SIZE, TYPES, TokenizerType, train_tokenizer
from megatron_lite.utils.files import DataError

TOKENIZER_BYTES = 1 << 28  # training text that a new tokenizer is made from, at most
# A process for each core encodes where there is as much to read; it takes a tenth of a second until all have started.
WORKERS_FROM_BYTES = 1 << 22
MAX_WORKERS = 32  # more than this process can read and write for
_FORMAT = 1  # of what is kept in OUT/.partial and of what a text becomes; another one starts anew


@dataclass(frozen=True)
class SplitSummary:
    """One `.bin`/`.idx` pair: its prefix, documents, tokens (ends of documents included), bytes of text in UTF-8."""

    prefix: str
    documents: int
    tokens: int
    text_bytes: int


@dataclass(frozen=True)
class CorpusSummary:
    """What `prepare_corpus` made; `meta.json` holds the same, with paths relative to its folder.

    made_from: a hash of the files' names, sizes and times, of the options and of the tokenizer.
    """

    tokenizer: str
    vocab_size: int
    dtype: str
    end_of_document_id: int
    seed: int
    valid_fraction: float
    test_fraction: float
    train: SplitSummary
    valid: SplitSummary | None
    test: SplitSummary | None
    valid_text: str | None
    test_text: str | None
    skipped: tuple[str, ...]
    made_from: str

    @property
    def splits(self) -> tuple[SplitSummary, ...]:
        """Those that there are."""
        return tuple(split for split in (self.train, self.valid, self.test) if split is not None)


@dataclass(frozen=True)
class _Request:
    """What a corpus is made of, checked."""

    files: tuple[TextFile, ...]
    splits: Splits
    text_key: str
    errors: Literal["raise", "skip"]
    tokenizer: Tokenizer | None
    tokenizer_type: TokenizerType
    vocab_size: int
    end_token: str | None

    def made_from(self) -> dict[str, Any]:
        """All that the result depends on, as JSON. `errors` is not in it: it changes nothing of what was read."""
        trained = {"type": self.tokenizer_type, "vocab_size": self.vocab_size, "bytes": TOKENIZER_BYTES}
        given = self.tokenizer and hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()
        return {
            "format": _FORMAT,
            "library": tokenizers.__version__,
            "splits": json.loads(json.dumps(asdict(self.splits))),  # as it reads back: tuples become lists
            "text_key": self.text_key,
            "end_token": self.end_token,
            "tokenizer": given or trained,
            "files": [[str(file.path.absolute()), file.disk_bytes, file.modified_ns] for file in self.files],
        }


def prepare_corpus(
    files: Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    tokenizer_type: TokenizerType = "bpe",
    vocab_size: int = 8192,
    valid_fraction: float = 0.05,
    test_fraction: float = 0.0,
    seed: int = 0,
    text_key: str = "text",
    end_token: str | None = None,
    errors: Literal["raise", "skip"] = "raise",
    overwrite: bool = False,
    progress: bool = True,
    console: Console | None = None,
    tell: Callable[[str], None] | None = None,
) -> CorpusSummary:
    """Turn text into `train`, `valid` and `test` token files, and leave what an evaluation needs beside them.

    A text file is a document; a `.jsonl` file has one a line and a `.parquet` file one a row, under `text_key`. All but
    Parquet may end in .gz or .zst. Which split a document belongs to follows from a hash of its text and the seed:
    copies of a text stay together, whatever their names and order. Each split that has a fraction gets at least
    one document; a text that is alone is divided. Text that reads like a special token is encoded as text.

    `folder` receives train.bin, train.idx, the same and the text as it was (valid.txt) for the other splits,
    tokenizer.json and meta.json. They appear when all are complete. Until then what is done is kept in
    `folder`/.partial: the same call goes on from there after an interruption, a kill or a full disk, and ends with the
    very bytes of a run that was left alone. Other files, options or another tokenizer start anew. A call for what is
    already there returns its summary.

    Args:
        tokenizer: a tokenizer.json, a SentencePiece .model, or the folder of one; without it, one of `tokenizer_type`
            and up to `vocab_size` tokens is trained on the first 256 MiB of the training split.
        end_token: what ends a document; by default the `eos_token` of a tokenizer_config.json beside the tokenizer,
            `<|endoftext|>`, or what the tokenizer has in its place.
        errors: with "skip", documents that are no UTF-8 or no valid JSON are left out and listed in the summary.
        overwrite: replace another corpus, or files of the same names, in `folder`. They stay until the new ones
            are complete.
        progress: show a progress bar on `console` (standard error).
        tell: is given a line when an interrupted run is taken up.

    Raises:
        DataError: no text, a file that cannot be read or is damaged, a document that is not UTF-8, a folder that holds
            something else or cannot be written, no space left on the disk.
        ValueError: a fraction outside 0 .. 1, a vocabulary below 257, an unknown tokenizer type or value of `errors`.
    """
    _check_values(
        valid_fraction, test_fraction, errors, tokenizer_type, vocab_size if tokenizer is None else MIN_VOCAB_SIZE
    )
    if not files:
        raise DataError("no text files are given; name at least one")
    request = _Request(
        files=tuple(look_at(file) for file in files),
        splits=Splits(valid_fraction, test_fraction, seed),
        text_key=text_key,
        errors=errors,
        tokenizer=None if tokenizer is None else load_tokenizer(tokenizer),
        tokenizer_type=tokenizer_type,
        vocab_size=vocab_size,
        end_token=end_token or (None if tokenizer is None else declared_end(tokenizer)),
    )
    request = replace(request, splits=plan(request.splits, request.files, text_key, errors))
    out = Path(folder)
    made_from = request.made_from()
    digest = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
    there = _find_made(out, made_from, digest, overwrite)
    if there is not None and (errors == "skip" or not there.skipped):
        return there
    columns = (TextColumn("{task.description:>18}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with (
        Partial(out, made_from, may_skip=errors == "skip") as partial,
        Progress(*columns, console=console or Console(stderr=True), disable=not progress) as bar,
    ):
        if not partial.is_finished:
            _make(request, partial, digest, bar, tell)
        partial.publish()
    return read_summary(out)


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
            for name in SPLITS
        }
        keys = ("tokenizer", "valid_text", "test_text")
        places = {key: record[key] and str(path.parent / record[key]) for key in keys}
        return CorpusSummary(**{**record, **splits, **places, "skipped": tuple(record["skipped"])})
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; make the folder with `megatron-lite data`") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is damaged ({error}); make the folder again with `megatron-lite data`") from error


def _check_values(valid_fraction: float, test_fraction: float, errors: str, kind: str, vocab_size: int) -> None:
    for name, fraction in (("valid_fraction", valid_fraction), ("test_fraction", test_fraction)):
        if not 0 <= fraction < 1:
            raise ValueError(f"{name} is {fraction}, it must lie in 0 <= {name} < 1")
    if valid_fraction + test_fraction >= 1:
        raise ValueError(
            f"valid_fraction {valid_fraction} and test_fraction {test_fraction} leave nothing to train on; "
            "their sum must be below 1"
        )
    if errors not in ("raise", "skip"):
        raise ValueError(f"errors is {errors!r}, it must be 'raise' or 'skip'")
    if kind not in TYPES:
        raise ValueError(f"tokenizer_type is {kind!r}, it must be one of {', '.join(TYPES)}")
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size is {vocab_size}, a tokenizer that is trained here needs at least {MIN_VOCAB_SIZE}"
        )


def _find_made(out: Path, made_from: dict[str, Any], digest: str, overwrite: bool) -> CorpusSummary | None:
    """The summary if `out` holds just this corpus; DataError if it holds something else that may not be replaced."""
    names = [
        "meta.json",
        "tokenizer.json",
        *(f"{split}{suffix}" for split in SPLITS for suffix in (".bin", ".idx", ".txt")),
    ]
    found = [name for name in names if (out / name).exists()]
    if "meta.json" in found:
        try:
            summary = read_summary(out)
        except DataError:
            summary = None
        pairs = (
            [f"{split.prefix}{suffix}" for split in summary.splits for suffix in (".bin", ".idx")] if summary else []
        )
        if summary and summary.made_from == digest and all(map(os.path.exists, [*pairs, summary.tokenizer])):
            return summary
    elif is_being_published(out, made_from):
        return None
    if found and not overwrite:
        what = "holds another corpus" if "meta.json" in found else f"holds {', '.join(found)}"
        raise DataError(f"{out}: {what}; choose another folder with --out, or replace it with --overwrite")
    return None


def _make(request: _Request, partial: Partial, digest: str, bar: Progress, tell: Callable[[str], None] | None) -> None:
    splits, state = request.splits, partial.state
    if tell is not None and any(written.tokens for written in state.written):
        tokens = sum(written.tokens for written in state.written)
        tell(f"going on where an earlier run stopped, with {tokens:,} tokens in {partial.folder}")
    tokenizer = _tokenizer(request, partial, bar)
    end = end_of_document_id(tokenizer, request.end_token)
    vocab_size = tokenizer_vocab_size(tokenizer)
    dtype = token_dtype(vocab_size)
    partial.open(dtype)
    disk_bytes = sum(file.disk_bytes for file in request.files)
    num_workers = min(len(os.sched_getaffinity(0)), MAX_WORKERS) if disk_bytes >= WORKERS_FROM_BYTES else 0
    task = bar.add_task("encoding", total=disk_bytes)

    def write(batch: Batch, tokens: list[SplitTokens]) -> None:
        partial.append(batch, tokens)
        bar.update(task, completed=batch.disk)

    documents = iter_documents(request.files, request.text_key, state.position)
    parts = read_parts(documents, splits, request.errors)
    Encoder(tokenizer, end, dtype, num_workers).run(read_batches(parts, state.position), write)
    _check_unchanged(request.files)
    bar.update(task, completed=bar.tasks[task].total)
    partial.finish(_meta(partial, digest, splits, dtype.name, end, vocab_size), splits.wanted)


def _tokenizer(request: _Request, partial: Partial, bar: Progress) -> Tokenizer:
    """The one that is asked for, as it lies in the partial folder."""
    if partial.tokenizer.exists():
        return load_tokenizer(partial.tokenizer)
    tokenizer, files_read = request.tokenizer, 0
    if tokenizer is None:
        reached = [0]
        texts = _training_text(request, reached, bar)
        tokenizer = train_tokenizer(texts, request.vocab_size, request.tokenizer_type)
        files_read = reached[0]
    end_of_document_id(tokenizer, request.end_token)
    partial.save_tokenizer(tokenizer.to_str(pretty=True), files_read)
    return tokenizer


def _training_text(request: _Request, reached: list[int], bar: Progress) -> Iterator[str]:
    """Pieces of the training split; `reached` becomes the number of files that were opened for them."""
    left = TOKENIZER_BYTES
    total = min(left, sum(file.disk_bytes for file in request.files))
    task = bar.add_task("training tokenizer", total=total)
    for part in read_parts(iter_documents(request.files, request.text_key), request.splits, request.errors):
        reached[0] = part.document.position.file + 1
        if isinstance(part, Skipped) or part.split != TRAIN:
            continue
        for piece in part.document.pieces(part.held):
            yield piece.decode("utf-8")
            bar.advance(task, len(piece))
            left -= len(piece)
            if left <= 0:
                return
    bar.update(task, completed=total)


def _check_unchanged(files: Sequence[TextFile]) -> None:
    for file in files:
        if look_at(file.path) != file:
            raise DataError(
                f"{file.path}: was changed while it was read; give the same command again when nothing writes to it"
            )


def _meta(partial: Partial, digest: str, splits: Splits, dtype: str, end: int, vocab_size: int) -> str:
    state = partial.state
    summaries: list[SplitSummary | None] = [None for _ in SPLITS]
    for split in splits.wanted:
        written = state.written[split]
        summaries[split] = SplitSummary(SPLITS[split], written.documents, written.tokens, written.text_bytes)
    train = summaries[TRAIN]
    assert train is not None
    skipped = list(state.skipped)
    if state.num_skipped > len(skipped):
        skipped.append(f"{state.num_skipped - len(skipped):,} more")
    summary = CorpusSummary(
        tokenizer="tokenizer.json",
        vocab_size=vocab_size,
        dtype=dtype,
        end_of_document_id=end,
        seed=splits.seed,
        valid_fraction=splits.valid_fraction,
        test_fraction=splits.test_fraction,
        train=train,
        valid=summaries[VALID],
        test=summaries[TEST],
        valid_text="valid.txt" if summaries[VALID] else None,
        test_text="test.txt" if summaries[TEST] else None,
        skipped=tuple(skipped),
        made_from=digest,
    )
    return json.dumps(asdict(summary), indent=2) + "\n"
