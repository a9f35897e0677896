"""Which documents train, validate and test: by a hash of the text, so that neither names nor order matter."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_lite.data.documents import Document, iter_documents
from megatron_lite.data.sources import BadDocument, TextFile
from megatron_lite.utils.files import DataError

TRAIN, VALID, TEST = 0, 1, 2
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Part:
    """A document, or a part of one, and where it goes.

    held: its text, unless that is too large for memory. size: bytes of the text of the whole document. begins: whether
    the first piece is where the part begins, rather than where an interrupted run goes on.
    """

    split: int
    document: Document
    held: bytes | None
    size: int
    begins: bool


@dataclass(frozen=True)
class Skipped:
    """A document that is left out, and why."""

    document: Document
    reason: str


@dataclass(frozen=True)
class Splits:
    """A document belongs to valid if its score is below `valid_fraction`, to test if it is below the sum of both.

    The score is a number in 0 .. 1 from a hash of the text and the seed. Copies of a text stay together, and a
    larger fraction of valid alone takes nothing away from it.

    `moved` and `divided` see to it that no split that is asked for stays empty where documents are few (`plan`):
    scores of texts that go elsewhere, with the split; and whether there is one document, of which each split gets a
    part.
    """

    valid_fraction: float
    test_fraction: float
    seed: int
    moved: tuple[tuple[float, int], ...] = ()
    divided: bool = False

    @property
    def wanted(self) -> tuple[int, ...]:
        fractions = (1.0, self.valid_fraction, self.test_fraction)
        return tuple(split for split in (TRAIN, VALID, TEST) if fractions[split])

    def split_of(self, score: float) -> int:
        for moved, split in self.moved:
            if moved == score:
                return split
        if score < self.valid_fraction:
            return VALID
        return TEST if score < self.valid_fraction + self.test_fraction else TRAIN

    def parts_of(self, document: Document) -> Iterator[Part]:
        """The document with its split, none if it has no text, or the parts of a divided one.

        Raises:
            BadDocument: it is no text; nothing of it has been given then.
        """
        if self.divided:
            yield from self._divide(document)
            return
        held = document.held()
        whole = held if not document.start else replace(document, start=0).held()
        score, size = self.score(document, whole)
        if size:
            yield Part(self.split_of(score), document, held, size, begins=not document.start)

    def _divide(self, document: Document) -> Iterator[Part]:
        parts = replace(document, start=0).parts(
            [(self.valid_fraction, self.test_fraction)[s - 1] for s in self.wanted[1:]]
        )
        if any(part.start == part.stop for part in parts):
            if parts[-1].stop == 0:
                return
            raise DataError(
                f"{document.name}: is the only document, and too short to hold out "
                f"{self.valid_fraction + self.test_fraction:g} of it; give more text, or set the fractions to 0"
            )
        for split, part in zip(self.wanted, parts, strict=True):
            assert part.stop is not None
            if part.stop > document.start:
                rest = replace(part, start=max(part.start, document.start))
                yield Part(split, rest, rest.held(), parts[-1].stop or 0, begins=rest.start == part.start)

    def score(self, document: Document, whole: bytes | None) -> tuple[float, int]:
        """A number in 0 .. 1 that depends on the text and the seed, and the size of the text in bytes."""
        digest = hashlib.blake2b(digest_size=8, key=str(self.seed).encode())
        size = 0
        for block in [whole] if whole is not None else replace(document, start=0).blocks():
            digest.update(block)
            size += len(block)
        # 53 bits: a float holds them exactly, and the quotient stays below 1.
        return (int.from_bytes(digest.digest(), "little") >> 11) / 2**53, size


def read_parts(
    documents: Iterable[Document], splits: Splits, errors: Literal["raise", "skip"]
) -> Iterator[Part | Skipped]:
    """The documents with their splits, without those that have no text.

    Raises:
        BadDocument: a document that is no text, unless `errors` is "skip".
    """
    for document in documents:
        try:
            yield from splits.parts_of(document)
        except BadDocument as error:
            if errors == "raise":
                raise
            yield Skipped(document, str(error))


def plan(splits: Splits, files: Sequence[TextFile], text_key: str, errors: Literal["raise", "skip"]) -> Splits:
    """The same splits, with what it takes that none of them is empty.

    Reads from the start until each split has a document, which is soon where documents are many; so, where they are
    few, all of them. An empty valid or test gets the text whose score is nearest (the lowest), an empty train the
    one with the highest, with all its copies. A document that is alone is divided.

    Raises:
        DataError: no text at all, or fewer different texts than splits.
    """
    seen: set[float] = set()  # scores: copies of a text have one
    counts, num_documents = [0, 0, 0], 0
    for document in iter_documents(files, text_key):
        try:
            score, size = splits.score(document, document.held())
        except BadDocument:
            if errors == "raise":
                raise
            continue
        if size:
            num_documents += 1
            counts[splits.split_of(score)] += score not in seen
            seen.add(score)
        if seen and all(counts[split] for split in splits.wanted):
            return splits
    if not seen:
        raise DataError("the files hold no text that can be used; name others")
    if num_documents == 1:
        return replace(splits, divided=True)
    if len(seen) < len(splits.wanted):
        names = " and ".join(SPLITS[split] for split in splits.wanted)
        raise DataError(
            f"different texts among the {num_documents:,} documents: {len(seen)}, too few for {names}; give more, or "
            "set a fraction to 0"
        )
    return replace(splits, moved=tuple(_moves(splits, sorted(seen), counts)))


def _moves(splits: Splits, scores: list[float], counts: list[int]) -> Iterator[tuple[float, int]]:
    where = [splits.split_of(score) for score in scores]
    for split in splits.wanted:
        if counts[split]:
            continue
        order = range(len(scores) - 1, -1, -1) if split == TRAIN else range(len(scores))
        chosen = next(place for place in order if counts[where[place]] > 1)
        counts[where[chosen]] -= 1
        counts[split] += 1
        where[chosen] = split
        yield scores[chosen], split
