"""Samples against slices of the plain list of tokens."""

from __future__ import annotations

import itertools
import time
import timeit
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.data import DataError, IndexedReader, IndexedWriter, TokenDataset, split_fractions
from megatron_lite.data.dataset import SampleRows

LENGTHS = [[5, 0, 7, 20], [0, 9], [1, 1, 1, 30]]  # tokens of each document, file by file


def corpus(folder: Path, lengths: list[list[int]] = LENGTHS, dtypes: str = "HiH") -> tuple[list[Path], list[list[int]]]:
    """Files of documents with distinct tokens 0, 1, 2, ... and the documents as lists."""
    count = itertools.count()
    prefixes, documents = [], []
    for number, (file, dtype) in enumerate(zip(lengths, itertools.cycle(dtypes), strict=False)):
        prefixes.append(folder / f"part{number}")
        with IndexedWriter(prefixes[-1], np.dtype(dtype)) as writer:
            for length in file:
                documents.append([next(count) for _ in range(length)])
                writer.add_document(documents[-1])
    return prefixes, documents


@pytest.mark.parametrize("seq_len", [1, 2, 7, 8, 72, 73])
def test_sample_is_the_slice_of_the_stream(tmp_path: Path, seq_len: int) -> None:
    prefixes, documents = corpus(tmp_path)
    stream = [token for document in documents for token in document]
    dataset = TokenDataset(prefixes, seq_len)
    assert dataset.num_tokens == len(stream) == 74
    assert len(dataset) == 73 // seq_len
    for index in range(len(dataset)):
        sample = dataset.sample(index)
        assert sample.tokens.dtype == np.int64 and type(sample.tokens) is np.ndarray
        assert sample.tokens.tolist() == stream[index * seq_len : (index + 1) * seq_len + 1]
        assert sample.document_ids is None and sample.positions is None
    for index in (-1, len(dataset)):
        with pytest.raises(IndexError):
            dataset.sample(index)


def test_the_order_of_the_files_counts(tmp_path: Path) -> None:
    prefixes, documents = corpus(tmp_path)
    backward = TokenDataset(prefixes[::-1], 8)
    stream = [token for part in (documents[6:], documents[4:6], documents[:4]) for doc in part for token in doc]
    assert [backward.sample(i).tokens.tolist() for i in range(9)] == [stream[8 * i : 8 * i + 9] for i in range(9)]


def test_samples_are_copies_that_may_be_changed(tmp_path: Path) -> None:
    dataset = TokenDataset(corpus(tmp_path)[0], 8)
    dataset.sample(0).tokens[:] = -7
    assert dataset.sample(0).tokens.min() >= 0


@pytest.mark.parametrize("seq_len", [1, 2, 7, 8, 72])
def test_isolated_documents(tmp_path: Path, seq_len: int) -> None:
    prefixes, documents = corpus(tmp_path)
    owner = [number for number, document in enumerate(documents) for _ in document]
    dataset = TokenDataset(prefixes, seq_len, isolate_documents=True)
    for index in range(len(dataset)):
        sample = dataset.sample(index)
        assert sample.document_ids is not None and sample.positions is not None
        assert sample.document_ids.dtype == np.int32 and sample.positions.dtype == np.int64
        owners = owner[index * seq_len : (index + 1) * seq_len]
        first_of = {number: owners.index(number) for number in dict.fromkeys(owners)}
        assert sample.document_ids.tolist() == [list(first_of).index(number) for number in owners]
        assert sample.positions.tolist() == [place - first_of[number] for place, number in enumerate(owners)]
    if seq_len == 72:  # negative control: the case has boundaries at all
        assert dataset.sample(0).document_ids.max() == 7  # type: ignore[union-attr]


def test_too_few_tokens_says_how_many_are_needed(tmp_path: Path) -> None:
    prefixes, _ = corpus(tmp_path, [[10]])
    assert len(TokenDataset(prefixes, 9)) == 1
    with pytest.raises(DataError, match=r"10 tokens are too few .* seq_len 10, which needs 11.* at most 9"):
        TokenDataset(prefixes, 10)
    with pytest.raises(DataError, match=r"data\.train"):
        TokenDataset([], 10)


def test_tokens_must_be_integers(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", np.float32) as writer:
        writer.add_document([1, 2, 3])
    with pytest.raises(DataError, match="float32"):
        TokenDataset([tmp_path / "a"], 2)


@pytest.mark.parametrize(("bad", "dtype"), [(74, "i"), (-1, "i"), (65535, "H")])
def test_a_token_outside_the_vocabulary(tmp_path: Path, bad: int, dtype: str) -> None:
    prefixes, _ = corpus(tmp_path)
    with IndexedWriter(tmp_path / "bad", np.dtype(dtype)) as writer:
        writer.add_document([1, 2, 3, 4])
        writer.add_document([5, bad, 6])
    prefixes.append(tmp_path / "bad")
    dataset = TokenDataset(prefixes, 8, vocab_size=74)
    for index in range(8):
        dataset.sample(index)
    words = rf"bad\.bin: token 5 has the id {bad}, outside a vocabulary of 74 \(0 \.\. 73\)"
    with pytest.raises(DataError, match=words):
        dataset.sample(9)  # tokens 72 .. 80 of the stream; the bad one is 79
    with pytest.raises(DataError, match=words):
        dataset.check_token_ids(74)
    assert TokenDataset(prefixes, 8).sample(9).tokens[7] == bad  # not checked unless asked for
    if bad > 0:
        dataset.check_token_ids(bad + 1)


def test_the_last_target_is_checked_too(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", np.int32) as writer:
        writer.add_document([0, 1, 2, 3, 9])
    with pytest.raises(DataError, match="token 4 has the id 9"):
        TokenDataset([tmp_path / "a"], 4, vocab_size=9).sample(0)


@pytest.mark.parametrize("seq_len", [1, 3, 8])
def test_parts_of_a_split_hold_each_document_once(tmp_path: Path, seq_len: int) -> None:
    """By document, in each file, from the first to the last; together they are the whole."""
    prefixes, documents = corpus(tmp_path, [[5, 0, 7, 20, 3, 3, 1, 4, 4, 2], [30, 9, 8, 7]])
    by_file = [documents[:10], documents[10:]]
    bounds = [(0, 5, 8, 10), (0, 2, 3, 4)]  # 0.5, 0.3, 0.2 of 10; of 4: 2, round(3.2), 4
    for number, fractions in enumerate(split_fractions([0.5, 0.3, 0.2])):
        stream, owner = [], []
        for file, cuts in zip(by_file, bounds, strict=True):
            for document in file[cuts[number] : cuts[number + 1]]:
                stream += document
                owner += [document[0] if document else -1] * len(document)
        dataset = TokenDataset(prefixes, seq_len, isolate_documents=True, fractions=fractions)
        assert dataset.num_tokens == len(stream)
        for index in range(len(dataset)):
            sample = dataset.sample(index)
            first = index * seq_len
            assert sample.tokens.tolist() == stream[first : first + seq_len + 1]
            assert sample.document_ids is not None and sample.positions is not None
            owners = owner[first : first + seq_len]
            changes = np.cumsum([place > 0 and owners[place] != owners[place - 1] for place in range(seq_len)])
            assert sample.document_ids.tolist() == changes.tolist()
            assert sample.positions.tolist() == [place - owners.index(one) for place, one in enumerate(owners)]


def test_a_part_reads_no_token_of_another(tmp_path: Path) -> None:
    """A bad id in the part to train on is no error of the part to evaluate on."""
    with IndexedWriter(tmp_path / "a", np.int32) as writer:
        writer.add_document([999] * 10)
        writer.add_document([1] * 10)
    train, valid = (TokenDataset([tmp_path / "a"], 4, vocab_size=9, fractions=f) for f in ((0.0, 0.5), (0.5, 1.0)))
    valid.check_token_ids(9)
    assert valid.sample(0).tokens.tolist() == [1] * 5
    with pytest.raises(DataError, match="token 0 has the id 999"):
        train.check_token_ids(9)


def test_a_file_with_jumps(tmp_path: Path) -> None:
    """Sequences that lie in another order than the index names them, among files without jumps."""
    prefixes, documents = corpus(tmp_path, [[5, 6], [4, 8, 3], [7, 7]], dtypes="HHH")
    path = prefixes[1].with_suffix(".idx")
    data = bytearray(path.read_bytes())
    begin = 34 + 3 * 4
    data[begin : begin + 24] = np.array([22, 0, 16], dtype="<i8").tobytes()  # lengths 4, 8, 3 from tokens 11, 0 and 8
    path.write_bytes(bytes(data))
    old = [token for document in documents[2:5] for token in document]
    shuffled = [old[11:15], old[0:8], old[8:11]]
    assert not IndexedReader(prefixes[1]).is_contiguous and IndexedReader(prefixes[0]).is_contiguous
    stream = [token for document in [*documents[:2], *shuffled, *documents[5:]] for token in document]
    owner = [n for n, document in enumerate([*documents[:2], *shuffled, *documents[5:]]) for _ in document]
    dataset = TokenDataset(prefixes, 5, isolate_documents=True)
    for index in range(len(dataset)):
        sample = dataset.sample(index)
        assert sample.tokens.tolist() == stream[5 * index : 5 * index + 6]
        assert sample.document_ids is not None
        assert sample.document_ids.tolist() == [n - owner[5 * index] for n in owner[5 * index : 5 * index + 5]]


def test_many_short_documents_are_read_as_fast_as_long_ones(tmp_path: Path) -> None:
    """A hundred documents in a sample cost no loop over them: at most five times what one costs."""
    seconds = []
    for length in (1, 20_000):
        with IndexedWriter(tmp_path / f"a{length}", np.uint16) as writer:
            for _ in range(20_000 // length):
                writer.add_document([1] * length)
        dataset = TokenDataset([tmp_path / f"a{length}"], 100, isolate_documents=True)
        ids, out = np.arange(190), SampleRows.empty(190, 100, True)
        best = min(timeit.repeat(partial(dataset.fill, ids, ids, out), timer=time.process_time, number=1, repeat=5))
        seconds.append(best)
        assert out.documents is not None and out.documents[:, -1].max() == (99 if length == 1 else 0)
    assert seconds[0] < 5 * seconds[1] + 2e-4
