"""Token files across: Megatron-Core's own builder and reader on one side, ours on the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")

from megatron_lite.data import DataError, IndexedReader, IndexedWriter, TokenDataset, split_fractions  # noqa: E402

DTYPES = [dtype.name for dtype in indexed_dataset.DType]
Document = list[list[int]]  # of sequences
DOCUMENTS: list[Document] = [[[5, 6], [7]], [[8, 9, 10]], [[]], [[11], [], [12, 13, 100]], [[1] * 40]]


def build(prefix: Path, dtype: str, documents: list[Document], multimodal: bool = False) -> Path:
    """A pair as Megatron-Core writes it, one `add_item` for each sequence."""
    builder = indexed_dataset.IndexedDatasetBuilder(
        str(prefix.with_suffix(".bin")), getattr(np, dtype), multimodal=multimodal
    )
    for document in documents:
        for mode, sequence in enumerate(document):
            builder.add_item(torch.tensor(sequence, dtype=torch.int64), mode)
        builder.end_document()
    builder.finalize(str(prefix.with_suffix(".idx")))
    return prefix


def flat(document: Document) -> list[int]:
    return [token for sequence in document for token in sequence]


def both(prefix: Path) -> tuple[bytes, bytes]:
    return prefix.with_suffix(".bin").read_bytes(), prefix.with_suffix(".idx").read_bytes()


def their_documents(prefix: Path) -> Iterator[list[Any]]:
    dataset = indexed_dataset.IndexedDataset(str(prefix))
    bounds = dataset.document_indices
    for first, last in itertools.pairwise(bounds):
        yield [token for sequence in range(first, last) for token in dataset[sequence].tolist()]


def test_the_parametrisation_covers_the_enum() -> None:
    assert len(DTYPES) == 8 and {"uint8", "float64", "uint16"} <= set(DTYPES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_their_file_reads_back_equal_here(tmp_path: Path, dtype: str) -> None:
    reader = IndexedReader(build(tmp_path / "theirs", dtype, DOCUMENTS))
    assert reader.dtype == np.dtype(dtype)
    assert reader.num_documents == len(DOCUMENTS)
    assert [reader.document(d).tolist() for d in range(len(DOCUMENTS))] == list(map(flat, DOCUMENTS))
    assert reader.read(0, reader.num_tokens).tolist() == [token for d in DOCUMENTS for token in flat(d)]
    assert reader.sequence_lengths.tolist() == [len(sequence) for document in DOCUMENTS for sequence in document]
    # Negative control: another text is another file.
    other = IndexedReader(build(tmp_path / "other", dtype, DOCUMENTS[::-1]))
    assert other.document(0).tolist() != reader.document(0).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_our_file_is_theirs_byte_for_byte_and_reads_back_equal_there(tmp_path: Path, dtype: str) -> None:
    single = [[flat(document)] for document in DOCUMENTS]
    build(tmp_path / "theirs", dtype, single)
    with IndexedWriter(tmp_path / "ours", dtype) as writer:
        for document in single:
            writer.add_document(document[0])
    assert both(tmp_path / "ours") == both(tmp_path / "theirs")
    assert list(their_documents(tmp_path / "ours")) == list(map(flat, DOCUMENTS))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merged_file_reads_back_equal(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`add_index` appends whole pairs, theirs and ours."""
    monkeypatch.setattr(indexed_dataset.gc, "collect", lambda: 0)  # theirs collects garbage after each, for seconds
    build(tmp_path / "a", dtype, DOCUMENTS[:3])
    with IndexedWriter(tmp_path / "b", dtype) as writer:
        for document in DOCUMENTS[3:]:
            writer.add_document(flat(document))
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "merged.bin"), getattr(np, dtype))
    for name in ("a", "b", "a"):
        builder.add_index(str(tmp_path / name))
    builder.finalize(str(tmp_path / "merged.idx"))
    reader = IndexedReader(tmp_path / "merged")
    expected = [flat(document) for document in [*DOCUMENTS, *DOCUMENTS[:3]]]
    assert [reader.document(d).tolist() for d in range(reader.num_documents)] == expected
    assert list(their_documents(tmp_path / "merged")) == expected


def test_documents_given_whole_with_lengths(tmp_path: Path) -> None:
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "a.bin"), np.int32)
    builder.add_document(torch.arange(6), [1, 5])
    builder.add_document(torch.arange(6, 8), [2])
    builder.finalize(str(tmp_path / "a.idx"))
    reader = IndexedReader(tmp_path / "a")
    assert [reader.document(d).tolist() for d in range(2)] == [list(range(6)), [6, 7]]
    assert reader.document_starts().tolist() == [0, 6]


def test_the_modes_of_a_multimodal_file_are_left_unread(tmp_path: Path) -> None:
    with_modes = build(tmp_path / "modes", "int32", DOCUMENTS, multimodal=True)
    without = build(tmp_path / "plain", "int32", DOCUMENTS)
    assert both(with_modes)[1][:-8] == both(without)[1] and len(both(with_modes)[1]) == len(both(without)[1]) + 8
    ours, plain = IndexedReader(with_modes), IndexedReader(without)
    assert ours.read(0, ours.num_tokens).tolist() == plain.read(0, plain.num_tokens).tolist()
    assert [ours.document(d).tolist() for d in range(len(DOCUMENTS))] == list(map(flat, DOCUMENTS))


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_of_their_file(tmp_path: Path, dtype: str) -> None:
    prefix = build(tmp_path / "theirs", dtype, DOCUMENTS)
    stream = [token for document in DOCUMENTS for token in flat(document)]
    if dtype.startswith("float"):
        with pytest.raises(DataError, match=rf"theirs\.idx: holds {dtype} values, tokens must be integers"):
            TokenDataset([prefix], 4)
        return
    dataset = TokenDataset([prefix], 4, isolate_documents=True, vocab_size=101)
    for number in range(len(dataset)):
        assert dataset.sample(number).tokens.tolist() == stream[4 * number : 4 * number + 5]
    sample = dataset.sample(0)  # 5 6 7 | 8: two sequences are one document
    assert sample.document_ids is not None and sample.document_ids.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("split", [(0.98, 0.01, 0.01), (0.5, 0.3, 0.2), (0.7, 0.3, 0.0), (1 / 3, 1 / 3, 1 / 3)])
@pytest.mark.parametrize("num_documents", [1, 7, 50, 999])
def test_the_parts_of_a_split_are_theirs(tmp_path: Path, split: tuple[float, ...], num_documents: int) -> None:
    config = pytest.importorskip("megatron.core.datasets.blended_megatron_dataset_config")
    matrix = config.convert_split_vector_to_split_matrix(list(split))
    with IndexedWriter(tmp_path / "a", np.int32) as writer:
        for document in range(num_documents):
            writer.add_document([document] * 3)
    for number, bounds in enumerate(split_fractions(split)):
        if matrix[number] is None:
            continue
        first, last = (round(bound * float(num_documents)) for bound in matrix[number])
        if last == first:
            with pytest.raises(DataError, match=r"in the part .* data\.split"):
                TokenDataset([tmp_path / "a"], 1, fractions=bounds)
            continue
        dataset = TokenDataset([tmp_path / "a"], 1, fractions=bounds)
        assert dataset.num_tokens == 3 * (last - first)
        assert dataset.sample(0).tokens[0] == first and dataset.sample(len(dataset) - 1).tokens[1] == last - 1
