"""A corpus while it is being made: files in OUT/.partial that grow, and a journal of how much of them counts.

    made-from.json    what the corpus is made from: files with their sizes and times, options, the tokenizer
    tokenizer.json    the tokenizer, once there is one
    SPLIT.bin         token ids so far
    SPLIT.lengths     int64, tokens of each document so far
    SPLIT.txt         text so far, of valid and test
    journal.json      a place in the input, and how long each file was there

The journal is replaced whole every few seconds, after the files are on the disk. A run that goes on cuts the files to
what the journal says and reads on from there. At the end the finished files are renamed into OUT, meta.json last.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_lite.data.documents import Position
from megatron_lite.data.encode import Batch, SplitTokens
from megatron_lite.data.indexed import MAX_SEQUENCE_TOKENS, write_index
from megatron_lite.data.splits import SPLITS, TRAIN
from megatron_lite.utils.files import NO_SPACE, AtomicFile, DataError

PARTIAL = ".partial"
JOURNAL_INTERVAL_S = 5.0
MAX_REASONS = 100  # of skipped documents that are told; the others are counted
_RESULTS = ("tokenizer.json", *(f"{split}{suffix}" for split in SPLITS for suffix in (".bin", ".idx", ".txt")))


def is_being_published(out: Path, made_from: dict[str, Any]) -> bool:
    """Whether a run that was made from the same ended while it renamed its files into `out`."""
    try:
        finished = json.loads((out / PARTIAL / "journal.json").read_text())["finished"]
        return finished and json.loads((out / PARTIAL / "made-from.json").read_text()) == made_from
    except (OSError, ValueError, KeyError, TypeError):
        return False


@dataclass
class Written:
    """Of one split. open_tokens: those of a document whose end is still to come."""

    documents: int = 0
    tokens: int = 0
    open_tokens: int = 0
    text_bytes: int = 0


@dataclass
class State:
    """Up to where the input has been read, and what is written of it."""

    position: Position = field(default_factory=Position)
    written: list[Written] = field(default_factory=lambda: [Written() for _ in SPLITS])
    skipped: list[str] = field(default_factory=list)
    num_skipped: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(record: dict[str, Any]) -> State:
        written = [Written(**part) for part in record["written"]]
        return State(Position(**record["position"]), written, record["skipped"], record["num_skipped"])


class Partial:
    """OUT/.partial, held by one process at a time; a context manager.

    Args:
        made_from: a JSON object whose "files" is a list with a record of each file; other values are compared as they
            are. An earlier run that was made from the same goes on. Files that it had not reached may have changed.

        may_skip: whether what an earlier run has left out is good enough.

    Raises:
        DataError: the folder cannot be written, the disk is full, or another process is at it.
    """

    def __init__(self, out: Path, made_from: dict[str, Any], *, may_skip: bool) -> None:
        self.out = out
        self.folder = out / PARTIAL
        self.state = State()
        self.is_finished = False
        self._before_file = State()  # at the last batch that ended before the file that is being read
        self._tokenizer_files = 0
        self._made_from = made_from
        self._made_folder = not out.exists()
        self._files: dict[str, IO[bytes]] = {}
        self._dtype = np.dtype("<u2")
        self._last_commit = time.monotonic()
        with self._explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / "lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise DataError(f"{out}: another `megatron-lite data` is writing there; wait for it, or end it") from None
        except OSError:
            pass  # a file system without locks
        if not self._take_up(may_skip):
            self._start_anew()

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer.json"

    def save_tokenizer(self, content: str, files_read: int) -> None:
        """files_read: so many of the files it comes from; when one of them changes, so does the tokenizer."""
        _write_file(self.tokenizer, content)
        self._tokenizer_files = files_read
        self._write_journal()

    def open(self, dtype: np.dtype[Any]) -> None:
        """Open the files to go on behind what the journal says."""
        self._dtype = dtype
        for split, written in enumerate(self.state.written):
            sizes = {"bin": written.tokens * dtype.itemsize, "lengths": written.documents * 8}
            if split != TRAIN:
                sizes["txt"] = written.text_bytes
            for suffix, size in sizes.items():
                path = self.folder / f"{SPLITS[split]}.{suffix}"
                with self._explained(path):
                    file = self._files[path.name] = path.open("ab")
                    found = file.seek(0, os.SEEK_END)
                    file.truncate(size)
                if found < size:
                    raise DataError(f"{path}: has {found:,} bytes of {size:,}; remove {self.folder} to start anew")

    def append(self, batch: Batch, tokens: Sequence[SplitTokens]) -> None:
        """Write one batch. What fails in the middle of it does not count."""
        written = [Written(**vars(before)) for before in self.state.written]
        for split, (new, part) in enumerate(zip(written, tokens, strict=True)):
            new.tokens += len(part.tokens)
            new.documents += len(part.ends)
            new.text_bytes += batch.text_bytes[split]
            lengths = np.diff(part.ends, prepend=-new.open_tokens)
            new.open_tokens += len(part.tokens) - int(lengths.sum())
            name = SPLITS[split]
            self._write(f"{name}.bin", part.tokens.tobytes())
            self._write(f"{name}.lengths", lengths.astype("<i8").tobytes())
            if split != TRAIN:
                self._write(f"{name}.txt", b"".join(batch.held_out[split]))
        here = self.state.position
        if batch.position.file > here.file or here == Position(here.file):
            self._before_file = self.state
        room = MAX_REASONS - len(self.state.skipped)
        self.state = State(
            batch.position,
            written,
            self.state.skipped + batch.skipped[:room],
            self.state.num_skipped + len(batch.skipped),
        )
        if time.monotonic() - self._last_commit >= JOURNAL_INTERVAL_S:
            self.commit()

    def commit(self) -> None:
        """Bring everything to the disk, then say so in the journal."""
        for name, file in self._files.items():
            with self._explained(self.folder / name):
                file.flush()
                os.fsync(file.fileno())
        self._write_journal()
        self._last_commit = time.monotonic()

    def finish(self, meta: str, wanted: Sequence[int]) -> None:
        """Complete the files of the splits that are wanted, and write meta.json."""
        self.commit()
        self._close()
        for split in wanted:
            self._write_index(SPLITS[split])
        for split in set(range(len(SPLITS))) - set(wanted):
            for suffix in (".bin", ".idx", ".txt"):
                (self.folder / f"{SPLITS[split]}{suffix}").unlink(missing_ok=True)
        _write_file(self.folder / "meta.json", meta)
        self.is_finished = True
        self._write_journal()

    def publish(self) -> None:
        """Rename what is finished into the folder, over what was there. May be repeated after an interruption."""
        assert self.is_finished
        with self._explained(self.out):
            # Without meta.json a folder is no corpus, and without its index a .bin is no tokens: at no moment does
            # an old one describe new files.
            for name in ["meta.json", *(f"{split}.idx" for split in SPLITS)]:
                if (self.folder / name).exists():
                    (self.out / name).unlink(missing_ok=True)
            made = json.loads((self.folder / "journal.json").read_text())["results"]
            for name in _RESULTS:
                if (self.folder / name).exists():
                    os.replace(self.folder / name, self.out / name)
                elif name not in made:
                    (self.out / name).unlink(missing_ok=True)
            if (self.folder / "meta.json").exists():
                os.replace(self.folder / "meta.json", self.out / "meta.json")
            shutil.rmtree(self.folder)
            _sync_folder(self.out)

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: object) -> None:
        if kind is not None and not self.is_finished and self._files:
            with suppress(DataError):
                self.commit()
        self._close()
        if kind is not None and self.state == State() and not self.tokenizer.exists():
            shutil.rmtree(self.folder, ignore_errors=True)  # nothing that is worth keeping
            if self._made_folder:
                with suppress(OSError):
                    self.out.rmdir()
        self._lock.close()

    def _take_up(self, may_skip: bool) -> bool:
        """Whether an earlier run left something to go on from."""
        try:
            made_from = json.loads((self.folder / "made-from.json").read_text())
            record = json.loads((self.folder / "journal.json").read_text())
            states = [State.from_json(record[name]) for name in ("state", "before_file")]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if {**made_from, "files": None} != {**self._made_from, "files": None}:
            return False
        old, new = made_from["files"], self._made_from["files"]
        if record["finished"]:
            self.is_finished = old == new
            return self.is_finished
        pairs = zip(new, old, strict=False)
        same = next((number for number, (mine, its) in enumerate(pairs) if mine != its), min(len(old), len(new)))
        usable = [state for state in states if state.position.file < same or state.position == Position(same)]
        usable = [state for state in usable if may_skip or not state.num_skipped]
        if not usable or same < record["tokenizer_files"]:
            return False
        self.state, self._before_file = usable[0], usable[-1]
        self._tokenizer_files = record["tokenizer_files"]
        _write_file(self.folder / "made-from.json", json.dumps(self._made_from))
        return True

    def _start_anew(self) -> None:
        (self.folder / "journal.json").unlink(missing_ok=True)  # first: what it tells of is about to go
        for path in self.folder.iterdir():
            if path.name != "lock":
                path.unlink()
        _write_file(self.folder / "made-from.json", json.dumps(self._made_from))

    def _write_journal(self) -> None:
        record = {
            "finished": self.is_finished,
            "tokenizer_files": self._tokenizer_files,
            "results": sorted(path.name for path in self.folder.iterdir() if path.name in _RESULTS),
            "state": self.state.to_json(),
            "before_file": self._before_file.to_json(),
        }
        _write_file(self.folder / "journal.json", json.dumps(record))

    def _write_index(self, split: str) -> None:
        lengths = np.fromfile(self.folder / f"{split}.lengths", dtype="<i8")
        # A sequence of the format holds less than 2**31 tokens; a longer document is several of them.
        sequences = -(-lengths // MAX_SEQUENCE_TOKENS)
        documents = np.concatenate([[0], np.cumsum(sequences)])
        full = np.full(int(documents[-1]), MAX_SEQUENCE_TOKENS, dtype=np.int64)
        full[documents[1:] - 1] = lengths - (sequences - 1) * MAX_SEQUENCE_TOKENS
        with AtomicFile(self.folder / f"{split}.idx") as file:
            write_index(file, self._dtype, full, documents)

    def _write(self, name: str, data: bytes) -> None:
        with self._explained(self.folder / name):
            self._files[name].write(data)

    def _close(self) -> None:
        for file in self._files.values():
            with suppress(OSError):  # closing flushes, and on a full disk that fails once more
                file.close()
        self._files.clear()

    @contextmanager
    def _explained(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in NO_SPACE:
                raise DataError(
                    f"{path}: no space left to write it ({error.strerror}); free some, raise the quota or the file-"
                    "size limit, then give the same command again: it goes on from here"
                ) from error
            raise DataError(
                f"{path}: cannot be written: {error.strerror}; choose a folder that you may write to"
            ) from error


def _write_file(path: Path, content: str) -> None:
    with AtomicFile(path) as file:
        file.write(content.encode())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
