"""The documents of text and JSONL files, read in pieces so that memory does not grow with the length of one."""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from megatron_lite.utils.files import DataError

PIECE_BYTES = 1 << 16
_CUT_TRIES = 64


@dataclass(frozen=True)
class Document:
    """A text of one file, or of one line of a JSONL file; `pieces` reads it, as often as one likes.

    `start` and `stop` are bytes of the text in UTF-8, and choose a part of it.
    """

    path: Path
    start: int = 0
    stop: int | None = None
    line: bytes | None = None
    line_number: int = 0
    line_offset: int = 0  # byte of the file at which the line begins
    text_key: str = "text"

    @property
    def name(self) -> str:
        return str(self.path) if self.line is None else f"{self.path}:{self.line_number}"

    def pieces(self) -> Iterator[str]:
        """The text, in pieces of about PIECE_BYTES that end where a tokenizer would begin a new word anyway.

        Raises:
            DataError: the file cannot be read, is no UTF-8 (with the offset of the first bad byte), or the line is
                no JSON object with a string under the text key.
        """
        offset = self.start
        for piece in self._raw_pieces():
            try:
                text = piece.decode("utf-8")
            except UnicodeDecodeError as error:
                raise self._not_utf8(offset + error.start) from None
            offset += len(piece)
            yield text

    def split(self, tail_fraction: float) -> tuple[Document, Document]:
        """Two documents: all but about the last `tail_fraction` of the text, and that; lines stay whole if they can."""
        text_bytes = sum(len(piece) for piece in self._raw_pieces())
        target, passed, cut = int(text_bytes * (1 - tail_fraction)), 0, 0
        for piece in self._raw_pieces():
            if passed + len(piece) > target:
                # A line that takes half of the tail or more is cut where the tail begins.
                line_end = piece.find(b"\n", target - passed, (target + text_bytes) // 2 - passed) + 1
                cut = passed + (line_end or _character_start(piece, target - passed))
                break
            passed += len(piece)
        return replace(self, stop=cut), replace(self, start=cut)

    def _raw_pieces(self) -> Iterator[bytes]:
        if self.line is not None:
            yield from _split_text(self._text_of_line()[self.start : self.stop])
            return
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                yield from _read_pieces(file, None if self.stop is None else self.stop - self.start)
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def _text_of_line(self) -> bytes:
        assert self.line is not None
        try:
            record = json.loads(self.line.decode("utf-8"))
            text = record[self.text_key]
            if not isinstance(text, str):
                raise TypeError
            return text.encode("utf-8")
        except UnicodeDecodeError as error:
            raise self._not_utf8(self.line_offset + error.start) from None
        except json.JSONDecodeError as error:
            raise DataError(f"{self.name}: is no JSON: {error.msg} at column {error.colno}") from None
        except UnicodeEncodeError:
            raise DataError(
                f"{self.name}: {self.text_key!r} holds half of a surrogate pair, which is no text"
            ) from None
        except (KeyError, TypeError):
            raise DataError(
                f"{self.name}: is no JSON object with a string under {self.text_key!r}; name the key that holds text"
            ) from None

    def _not_utf8(self, offset: int) -> DataError:
        return DataError(
            f"{self.name}: is not UTF-8: bad byte at offset {offset:,}; convert the file, or skip what is not UTF-8 "
            "with errors='skip'"
        )


def iter_documents(files: Iterable[str | os.PathLike[str]], text_key: str = "text") -> Iterator[Document]:
    """The documents of the files, in order: one a file, and one a line (blank ones apart) of a `.jsonl` file.

    Raises:
        DataError: a file that is missing, a folder, or not readable.
    """
    for name in files:
        path = Path(name)
        if path.is_dir():
            raise DataError(f"{path}: is a folder; name the text or .jsonl files in it")
        if path.suffix != ".jsonl":
            yield Document(path)
            continue
        offset = 0
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield Document(path, line=line, line_number=number, line_offset=offset, text_key=text_key)
                    offset += len(line)
        except OSError as error:
            raise _unreadable(path, error) from error


def python_standard_library_files(*, include_tests: bool = False) -> list[Path]:
    """The .py files of the running Python's standard library, in the order of their names: a corpus on every machine.

    Without `include_tests`, the folders test, tests, idle_test and idlelib are left out: some of their files are
    broken on purpose.
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "__pycache__"}
    if not include_tests:
        left_out |= {"test", "tests", "idle_test", "idlelib"}
    files = [
        (path.relative_to(root).as_posix(), path)
        for path in root.rglob("*.py")
        if left_out.isdisjoint(path.relative_to(root).parts) and path.is_file()
    ]
    return [path for _, path in sorted(files)]


def _read_pieces(file: IO[bytes], limit: int | None) -> Iterator[bytes]:
    rest = b""
    while chunk := file.read(PIECE_BYTES if limit is None else min(PIECE_BYTES, limit)):
        if limit is not None:
            limit -= len(chunk)
        rest += chunk
        if len(rest) > PIECE_BYTES:
            cut = _word_end(rest)
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield from _split_text(rest)


def _split_text(text: bytes) -> Iterator[bytes]:
    start = 0
    while len(text) - start > PIECE_BYTES:
        cut = _word_end(text[start : start + PIECE_BYTES])
        yield text[start : start + cut]
        start += cut
    if start < len(text):
        yield text[start:]


def _word_end(text: bytes) -> int:
    """Where to cut `text` for good: behind a newline that stands between two visible characters, near the end.

    There the pre-tokenizers in use end a word whatever follows. Failing that, behind a newline, or between any two
    characters.
    """
    newline = len(text)
    for _ in range(_CUT_TRIES):
        newline = text.rfind(b"\n", 1, newline)
        if newline < 0:
            break
        before = text[max(0, newline - 4) : newline].decode("utf-8", "ignore")[-1:]
        after = text[newline + 1 : newline + 5].decode("utf-8", "ignore")[:1]
        if before and after and not before.isspace() and not after.isspace():
            return newline + 1
    return text.rfind(b"\n") + 1 or _character_start(text, len(text) - 1)


def _character_start(text: bytes, place: int) -> int:
    """The last place at or before `place` where a UTF-8 character begins; `place` itself where text is no UTF-8."""
    for start in range(place, max(place - 4, 0), -1):
        if text[start] & 0xC0 != 0x80:
            return start
    return place


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read: {error.strerror}; correct the path or its permissions")
