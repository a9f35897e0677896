"""An interrupted run goes on where it stopped, ends with the bytes of one that was left alone, and replaces nothing."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from megatron_lite.data import DataError, documents, encode, partial, prepare
from megatron_lite.data.encode import Batch, Encoder, SplitTokens
from megatron_lite.data.partial import PARTIAL, Partial
from megatron_lite.data.prepare import prepare_corpus, read_summary
from megatron_lite.utils.files import AtomicFile

ROOT = Path(__file__).parents[2]
OPTIONS: dict[str, Any] = {"vocab_size": 300, "valid_fraction": 0.2, "test_fraction": 0.1, "progress": False}


class Stopped(BaseException):
    """What a test interrupts with."""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files of several kinds, small batches, and a journal after each of them."""
    monkeypatch.setattr(encode, "BATCH_PIECES", 3)
    monkeypatch.setattr(documents, "PIECE_BYTES", 200)
    monkeypatch.setattr(documents, "HELD_BYTES", 500)
    monkeypatch.setattr(partial, "JOURNAL_INTERVAL_S", 0.0)
    folder = tmp_path / "text"
    folder.mkdir()
    made = []
    for number in range(6):
        made.append(folder / f"{number}.{'txt' if number % 2 else 'jsonl'}")
        text = "".join(f"document {number}, line {line}: é 文字\n" for line in range(10 + 20 * number))
        lines = "".join(json.dumps({"text": f"{number} {line}: {text[: 40 * line]}"}) + "\n" for line in range(9))
        made[-1].write_text(text if number % 2 else lines)
    return made


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def stop_after(monkeypatch: pytest.MonkeyPatch, calls: int, owner: Any, name: str, error: BaseException) -> None:
    """The method fails at its call number `calls`, before it does anything."""
    method, done = getattr(owner, name), [0]

    def failing(*arguments: Any, **named: Any) -> Any:
        done[0] += 1
        if done[0] == calls:
            raise error
        return method(*arguments, **named)

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize("name", ["append", "commit", "_write", "_write_journal", "_write_index", "finish", "publish"])
def test_a_stopped_run_ends_with_the_same_bytes(
    tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    prepare_corpus(files, tmp_path / "whole", **OPTIONS)
    whole = content(tmp_path / "whole")
    out, stops = tmp_path / "out", 0
    for calls in (1, 2, 4, 9, 20):
        with monkeypatch.context() as patch:
            stop_after(patch, calls, Partial, name, Stopped())
            try:
                prepare_corpus(files, out, **OPTIONS)
            except Stopped:
                stops += 1
                assert not (out / "meta.json").exists()
    prepare_corpus(files, out, **OPTIONS)
    assert stops >= 1 and content(out) == whole
    assert not (out / PARTIAL).exists()


def test_it_goes_on_rather_than_beginning_again(
    tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [0]
    encode_batch = Encoder.encode

    def counted(self: Encoder, batch: Batch) -> list[SplitTokens]:
        batches[0] += 1
        return encode_batch(self, batch)

    monkeypatch.setattr(Encoder, "encode", counted)
    prepare_corpus(files, tmp_path / "whole", **OPTIONS)
    whole, batches[0] = batches[0], 0
    with monkeypatch.context() as patch:
        stop_after(patch, whole * 3 // 4, Partial, "append", Stopped())
        with pytest.raises(Stopped):
            prepare_corpus(files, tmp_path / "out", **OPTIONS)
    batches[0] = 0
    told: list[str] = []
    prepare_corpus(files, tmp_path / "out", tell=told.append, **OPTIONS)
    assert batches[0] < whole / 2 and len(told) == 1 and "going on" in told[0]
    # What is complete is not made again, and says the same.
    before, batches[0] = (tmp_path / "out" / "meta.json").stat().st_mtime_ns, 0
    assert prepare_corpus(files, tmp_path / "out", **OPTIONS) == read_summary(tmp_path / "out")
    assert batches[0] == 0 and (tmp_path / "out" / "meta.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("change", ["options", "first file", "file being read", "later file", "one more"])
def test_what_has_changed_is_done_again(
    tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Only what was read before a file that changed is kept."""
    trained = prepare_corpus(files, tmp_path / "trained", **OPTIONS).tokenizer
    options = {**OPTIONS, "tokenizer": trained, "test_fraction": 0.0}
    kept = [0]

    def start_of(self: Partial, dtype: Any) -> None:
        kept[0] = sum(written.tokens for written in self.state.written)
        opened(self, dtype)

    opened = Partial.open
    with monkeypatch.context() as patch:
        write = Partial.append

        def stop_in_third_file(self: Partial, batch: Batch, tokens: list[SplitTokens]) -> None:
            write(self, batch, tokens)
            if batch.position.file == 2 and batch.position.line > 4:
                raise Stopped

        patch.setattr(Partial, "append", stop_in_third_file)
        with pytest.raises(Stopped):
            prepare_corpus(files, tmp_path / "out", **options)
    if change == "options":
        options["seed"] = 3
    elif change == "one more":
        files.append(tmp_path / "more.txt")
        files[-1].write_text("one more document")
    else:
        path = files[{"first file": 0, "file being read": 2, "later file": 4}[change]]
        path.write_text(path.read_text() + '{"text": "a line that was not there"}\n')
    monkeypatch.setattr(Partial, "open", start_of)
    prepare_corpus(files, tmp_path / "out", **options)
    assert (kept[0] > 0) == (change not in ("options", "first file")), kept
    from_start = {**options, "overwrite": True}
    prepare_corpus(files, tmp_path / "whole", **from_start)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def full(*_: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("before", [False, True], ids=["fresh", "over an old corpus"])
@pytest.mark.parametrize("suffix", [".bin", ".lengths", ".txt", ".idx", "tokenizer.json", "journal.json", "meta.json"])
def test_a_full_disk(
    tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch, suffix: str, before: bool
) -> None:
    out = tmp_path / "out"
    if before:
        prepare_corpus(files[:2], out, **{**OPTIONS, "vocab_size": 280})
    old = content(out) if before else {}
    with monkeypatch.context() as patch:
        sync, finish = os.fsync, AtomicFile.finish

        def sync_on_full(descriptor: int) -> None:
            if os.readlink(f"/proc/self/fd/{descriptor}").endswith(suffix):
                full()
            sync(descriptor)

        def finish_on_full(self: AtomicFile) -> None:
            with monkeypatch.context() as inner:
                if self.path.name.endswith(suffix):
                    inner.setattr(os, "fsync", full)
                finish(self)

        patch.setattr(os, "fsync", sync_on_full)
        patch.setattr(AtomicFile, "finish", finish_on_full)
        with pytest.raises(DataError, match=rf"{suffix}: no space left.*free some"):
            prepare_corpus(files, out, overwrite=before, **OPTIONS)
    assert (content(out) if out.exists() else {}) == old
    prepare_corpus(files, out, overwrite=before, **OPTIONS)  # with space again: the same command
    prepare_corpus(files, tmp_path / "whole", **OPTIONS)
    assert content(out) == content(tmp_path / "whole")


def test_another_corpus_is_not_replaced_unasked(tmp_path: Path, files: list[Path]) -> None:
    out = tmp_path / "out"
    prepare_corpus(files, out, **OPTIONS)
    old = content(out)
    with pytest.raises(DataError, match=r"out: holds another corpus; .*--overwrite"):
        prepare_corpus(files[:3], out, **OPTIONS)
    assert content(out) == old and not (out / PARTIAL).exists()
    summary = prepare_corpus(files[:3], out, overwrite=True, **{**OPTIONS, "test_fraction": 0.0})
    # What the corpus before left of a test split would be text of another one now.
    assert summary.test is None and not [name for name in content(out) if name.startswith("test")]
    assert content(out)["train.bin"] != old["train.bin"]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "train.bin").write_bytes(b"somebody's tokens")
    with pytest.raises(DataError, match=r"foreign: holds train\.bin; .*--overwrite"):
        prepare_corpus(files, foreign, **OPTIONS)
    assert content(foreign) == {"train.bin": b"somebody's tokens"}


def test_folders_that_cannot_be_written(tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        prepare_corpus(files, tmp_path / "file" / "out", **OPTIONS)
    with (
        Partial(tmp_path / "out", {"files": []}, may_skip=False),
        pytest.raises(DataError, match="another `megatron-lite data` is writing there"),
    ):
        prepare_corpus(files, tmp_path / "out", **OPTIONS)

    def read_only(*_: Any, **__: Any) -> BinaryIO:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", read_only)  # root may write where the permissions forbid it
    with pytest.raises(DataError, match="cannot be written: Read-only file system; choose a folder"):
        prepare_corpus(files, tmp_path / "other", **OPTIONS)


def test_a_file_that_changes_while_it_is_read(
    tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    check = prepare._check_unchanged

    def changed(known: Any) -> None:
        files[0].write_text(files[0].read_text() + "\n")
        check(known)

    monkeypatch.setattr(prepare, "_check_unchanged", changed)
    with pytest.raises(DataError, match=r"0\.jsonl: was changed while it was read"):
        prepare_corpus(files, tmp_path / "out", **OPTIONS)
    assert content(tmp_path / "out") == {}


SCRIPT = """
import sys
from megatron_lite.data import documents, encode, partial
from megatron_lite.data.prepare import prepare_corpus
encode.BATCH_PIECES, documents.PIECE_BYTES, documents.HELD_BYTES, partial.JOURNAL_INTERVAL_S = 3, 200, 500, 0.0
out, *files = sys.argv[1:]
print("ready", flush=True)
prepare_corpus(files, out, vocab_size=300, valid_fraction=0.2, test_fraction=0.1, progress=False)
print("done", flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path, files: list[Path]) -> None:
    """SIGKILL, of the real process, later and later, until it gets through."""
    prepare_corpus(files, tmp_path / "whole", **OPTIONS)
    kills, delay_s, finished = 0, 0.0, False
    while not finished:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "out"), *map(str, files)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            time.sleep(delay_s)
            process.send_signal(signal.SIGKILL)
            finished = process.stdout.read() == "done\n"
        kills += not finished
        assert finished or not (tmp_path / "out" / "meta.json").exists() or not (tmp_path / "out" / PARTIAL).exists()
        delay_s += 0.02
    assert kills >= 2
    assert content(tmp_path / "out") == content(tmp_path / "whole")
