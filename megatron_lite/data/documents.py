"""The documents of text, JSONL and Parquet files, in pieces, so that memory does not grow with the length of a text."""

from __future__ import annotations

import codecs
import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

from megatron_lite.data.sources import BadDocument, Stream, TextFile, needs, unreadable
from megatron_lite.utils.files import DataError

PIECE_BYTES = 1 << 16
HELD_BYTES = 1 << 20  # a text file of up to this size is read once, and a larger one twice: for its hash, and to encode
# A line has to be in memory whole, as bytes, as text and as what JSON makes of it: some five times its size.
MAX_LINE_BYTES = 1 << 28
_PARQUET_ROWS = 1 << 8
_CUT_TRIES = 64


@dataclass(frozen=True)
class Position:
    """A place in a list of files, from which reading can go on.

    file: number of the file. offset: byte of its decompressed content, or row of a Parquet file. line: lines before
    it. inside: bytes of the text, in UTF-8, of the document there that are done with.
    """

    file: int = 0
    offset: int = 0
    line: int = 0
    inside: int = 0


@dataclass(frozen=True)
class Document:
    """A text file, a line of a JSONL file or a row of a Parquet file.

    `start` and `stop` are bytes of the text in UTF-8, and choose a part of it. `after` is the position of the next
    document. `disk_start` and `disk_stop` say how much of all files lies before and up to its end, for a progress bar.
    """

    file: TextFile
    name: str
    position: Position
    after: Position
    disk_start: int
    disk_stop: int
    load: Callable[[], bytes] | None = None  # the whole text of what is no text file
    start: int = 0
    stop: int | None = None

    def held(self) -> bytes | None:
        """The chosen part of the text in UTF-8; None for a text file that is too large to be held in memory.

        Raises:
            BadDocument: no UTF-8 (with the offset of the first bad byte), or no JSON object with a string under the
                text key.
        """
        if self.load is not None:
            return self.load()[self.start : self.stop]
        if self.file.disk_bytes > HELD_BYTES:
            return None
        with Stream(self.file) as stream:
            data = stream.read(HELD_BYTES + 1)
        if len(data) > HELD_BYTES:  # compressed, and larger than it looked
            return None
        self._check_utf8(data)
        return data[self.start : self.stop]

    def pieces(self, held: bytes | None = None) -> Iterator[bytes]:
        """The chosen part in pieces of up to PIECE_BYTES, which end where a tokenizer would begin a new word anyway.

        Where a piece ends depends on the text and on `start` only: reading may go on at the end of any piece.

        Args:
            held: what `held` gave, if it did.

        Raises:
            BadDocument: as `held`, when the bad byte is reached.
        """
        return cut_pieces([held]) if held is not None else cut_pieces(self.blocks())

    def blocks(self) -> Iterator[bytes]:
        """The chosen part in blocks of any size that are no UTF-8 by themselves, but all together."""
        if self.load is not None:
            yield self.load()[self.start : self.stop]
            return
        decoder = codecs.getincrementaldecoder("utf-8")()
        left = None if self.stop is None else self.stop - self.start
        with Stream(self.file, self.start) as stream:
            while left is None or left > 0:
                offset, pending = stream.offset, len(decoder.getstate()[0])
                data = stream.read(PIECE_BYTES if left is None else min(PIECE_BYTES, left))
                try:
                    decoder.decode(data, final=not data)
                except UnicodeDecodeError as error:
                    raise _not_utf8(self.name, offset - pending + error.start) from None
                if not data:
                    return
                left = None if left is None else left - len(data)
                yield data

    def parts(self, tails: Sequence[float]) -> list[Document]:
        """The text divided: what is left, then parts of about these fractions; lines stay whole if they can."""
        text_bytes = sum(map(len, self.blocks()))
        targets = [int(text_bytes * (1 - sum(tails[number:]))) for number in range(len(tails))]
        cuts, passed = [0], 0
        for piece in self.pieces():
            while len(cuts) <= len(targets) and passed + len(piece) > targets[len(cuts) - 1]:
                here = max(0, targets[len(cuts) - 1] - passed)
                end = targets[len(cuts)] if len(cuts) < len(targets) else text_bytes
                # A line that takes half of the part or more is cut where the part begins.
                line_end = piece.find(b"\n", here, (targets[len(cuts) - 1] + end) // 2 - passed) + 1
                cuts.append(passed + (line_end or _character_start(piece, here)))
            passed += len(piece)
        cuts += [text_bytes] * (len(targets) + 2 - len(cuts))
        return [replace(self, start=start, stop=stop) for start, stop in pairwise(cuts)]

    def _check_utf8(self, data: bytes) -> None:
        try:
            data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(self.name, error.start) from None


def iter_documents(
    files: Sequence[TextFile], text_key: str = "text", start: Position | None = None
) -> Iterator[Document]:
    """The documents of the files, in order: one a text file, one a line (blank ones apart), one a row.

    Args:
        text_key: the key of a JSON object, or the column of a Parquet file, that holds the text.
        start: the first document is the one there; its `start` is what was done of it.

    Raises:
        DataError: a file that cannot be read, is damaged or cut short, or a Parquet file without the column.
    """
    first = start or Position()
    before = sum(file.disk_bytes for file in files[: first.file])
    readers = {"text": _whole_file, "lines": _lines, "parquet": _rows}
    for number in range(first.file, len(files)):
        file = files[number]
        begin = first if number == first.file else Position(number)
        for document in readers[file.kind](file, before, begin, text_key):
            yield replace(document, start=begin.inside) if document.position == begin and begin.inside else document
        before += file.disk_bytes


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


def cut_pieces(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of up to PIECE_BYTES that are UTF-8 each; see `Document.pieces`."""
    rest = b""
    for block in blocks:
        rest += block
        place = 0
        while len(rest) - place > PIECE_BYTES:
            cut = _word_end(rest[place : place + PIECE_BYTES])
            yield rest[place : place + cut]
            place += cut
        rest = rest[place:]
    if rest:
        yield rest


def _whole_file(file: TextFile, before: int, start: Position, text_key: str) -> Iterator[Document]:
    yield Document(file, str(file.path), start, Position(start.file + 1), before, before + file.disk_bytes)


def _lines(file: TextFile, before: int, start: Position, text_key: str) -> Iterator[Document]:
    number, position, disk = start.line, start, before
    with Stream(file, start.offset) as stream:
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            name = f"{file.path}:{number}"
            load = partial(_text_of_line, name, text_key, position.offset, line)
            if len(line) > MAX_LINE_BYTES:
                load = partial(_too_long, name)
                while not line.endswith(b"\n") and (line := stream.readline(PIECE_BYTES)):
                    pass
            after = Position(start.file, stream.offset, number)
            if line.strip():
                reached = before + stream.disk_offset
                yield Document(file, name, position, after, disk, reached, load)
                disk = reached
            position = after


def _rows(file: TextFile, before: int, start: Position, text_key: str) -> Iterator[Document]:
    parquet, arrow = needs("pyarrow.parquet", file.path), needs("pyarrow", file.path)
    row = start.offset
    try:
        with parquet.ParquetFile(file.path, page_checksum_verification=True) as table:
            columns = table.schema_arrow
            if text_key not in columns.names:
                raise DataError(
                    f"{file.path}: has no column {text_key!r}; its columns are {', '.join(columns.names)}: "
                    "name the one that holds the text with --text-key"
                )
            kind = str(columns.field(text_key).type)
            if "string" not in kind:
                raise DataError(f"{file.path}: the column {text_key!r} holds {kind}, text is needed; name another")
            groups, first = _groups_from(table, row)
            total = max(1, table.metadata.num_rows)
            for batch in table.iter_batches(_PARQUET_ROWS, row_groups=groups, columns=[text_key]):
                # As bytes: what is no UTF-8 is then found text by text.
                values = batch.column(0).cast(arrow.large_string()).cast(arrow.large_binary()).to_pylist()
                for place, value in enumerate(values, start=first):
                    if place < row or not value:
                        continue
                    reached, stop = (before + file.disk_bytes * at // total for at in (place, place + 1))
                    name = f"{file.path} row {place}"
                    position, after = (Position(start.file, at, at) for at in (place, place + 1))
                    yield Document(file, name, position, after, reached, stop, partial(_text_of_row, name, value))
                first += len(values)
    except (arrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(file.path, error) from error
        raise DataError(
            f"{file.path}: is damaged or cut short, or no Parquet file: after row {row:,}: "
            f"{str(error).splitlines()[0]}; copy or download it again, then give the same command again"
        ) from error


def _groups_from(table: object, row: int) -> tuple[list[int], int]:
    """The row groups from the one that holds `row` on, and the number of the first row in them."""
    metadata = table.metadata  # type: ignore[attr-defined]
    first, group = 0, 0
    while group < metadata.num_row_groups and first + metadata.row_group(group).num_rows <= row:
        first += metadata.row_group(group).num_rows
        group += 1
    return list(range(group, metadata.num_row_groups)), first


def _text_of_row(name: str, value: bytes) -> bytes:
    try:
        value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(name, error.start) from None
    return value


def _too_long(name: str) -> bytes:
    raise BadDocument(
        f"{name}: the line is longer than {MAX_LINE_BYTES:,} bytes, and a line has to fit into memory; give this text "
        "as a file of its own (.txt, which is read in pieces), or leave it out with `megatron-lite data --skip-errors`"
    )


def _text_of_line(name: str, text_key: str, line_offset: int, line: bytes) -> bytes:
    try:
        text = json.loads(line.decode("utf-8"))[text_key]
        if not isinstance(text, str):
            raise TypeError
        return text.encode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(name, line_offset + error.start) from None
    except json.JSONDecodeError as error:
        raise BadDocument(
            f"{name}: is no JSON: {error.msg} at column {error.colno}; a file of JSON has one object a line: correct "
            f"the line, {_SKIP}"
        ) from None
    except UnicodeEncodeError:
        raise BadDocument(
            f"{name}: {text_key!r} holds half of a surrogate pair, which is no text; correct the line, {_SKIP}"
        ) from None
    except (KeyError, TypeError):
        raise BadDocument(
            f"{name}: is no JSON object with a string under {text_key!r}; name the key that holds text with --text-key"
        ) from None
    except RecursionError:
        raise BadDocument(f"{name}: is JSON that is nested too deeply; correct the line, {_SKIP}") from None


_SKIP = "or leave such documents out with `megatron-lite data --skip-errors`"


def _not_utf8(name: str, offset: int) -> BadDocument:
    return BadDocument(f"{name}: is not UTF-8: bad byte at offset {offset:,}; convert it, {_SKIP}")


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
