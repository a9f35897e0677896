"""The compiled index against its numpy reference, bit for bit, and both against definitions."""

from __future__ import annotations

import importlib
import logging
from types import ModuleType

import numpy as np
import pytest

from megatron_lite.data import index, index_reference

try:
    native = importlib.import_module("megatron_lite.data._index")
except ImportError:
    native = None  # type: ignore[assignment]
needs_native = pytest.mark.skipif(native is None, reason="megatron_lite.data._index is not built")
IMPLEMENTATIONS = [
    pytest.param(index_reference, id="numpy"),
    pytest.param(native, id="native", marks=needs_native),
]


@needs_native
@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 5, 255, 4096, 4097, 100_003])
def test_permutations_are_equal(num_samples: int) -> None:
    for seed, epoch, source in ((0, 0, 0), (2**64 - 1, 2**63, 65535), (1234, 7, 1)):
        expected = index_reference.permutation(num_samples, seed, epoch, source)
        assert native.permutation(num_samples, seed, epoch, source).tobytes() == expected.tobytes()
    if num_samples > 5:  # negative control: each of the three numbers counts
        others = [native.permutation(num_samples, *numbers).tobytes() for numbers in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
        assert len({*others, native.permutation(num_samples, 0, 0, 0).tobytes()}) == 4


@needs_native
@pytest.mark.parametrize("num_sources", [1, 2, 3, 17])
def test_blends_are_equal(num_sources: int) -> None:
    rng = np.random.default_rng(num_sources)
    shares = rng.integers(1, 2**40, num_sources)
    counts = np.zeros(num_sources, dtype=np.int64), np.zeros(num_sources, dtype=np.int64)
    for _ in range(3):  # from counts that are not zero too
        sources = np.empty(1000, dtype=np.uint16), np.empty(1000, dtype=np.uint16)
        for module, count, source in zip((native, index_reference), counts, sources, strict=True):
            module.fill_blend(shares, count, source)
        assert np.array_equal(*sources) and np.array_equal(*counts)
    assert counts[0].sum() == 3000


@needs_native
def test_shares_have_to_be_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        native.fill_blend(np.array([1, 0]), np.zeros(2, np.int64), np.zeros(4, np.uint16))


@needs_native
def test_a_blend_goes_on_far_from_its_beginning() -> None:
    """A count times the total of the shares leaves 64 bits here."""
    shares = np.array([2**59 + 12345, 2**58, 7 * 2**55 - 1])
    total = sum(shares.tolist())
    counts = np.array([round(10**9 * share / total) for share in shares.tolist()])
    assert int(counts[0]) * total > 2**64
    sources = np.empty(500, dtype=np.uint16), np.empty(500, dtype=np.uint16)
    for module, source in zip((native, index_reference), sources, strict=True):
        module.fill_blend(shares, counts.copy(), source)
    assert np.array_equal(*sources) and len(np.unique(sources[0])) == 3


def filled(
    module: ModuleType, file: np.ndarray, first: np.ndarray, rows: np.ndarray, seq_len: int, limit: int
) -> tuple:
    tokens = np.full((len(rows) + 1, seq_len), -7)  # one row is nobody's
    targets = tokens.copy()
    return module.gather_tokens(file, first, rows, limit, tokens, targets), tokens, targets


@pytest.mark.parametrize("module", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "i4", "i8", "u2"])
@pytest.mark.parametrize("seq_len", [1, 2, 33])
def test_gathered_tokens_are_slices(module: ModuleType, dtype: str, seq_len: int) -> None:
    rng = np.random.default_rng(0)
    file = rng.integers(0, 127, 200).astype(dtype)
    file[-1] = np.iinfo(dtype).max
    first = np.array([0, 200 - seq_len - 1, 17, 17])
    rows = np.array([3, 0, 4, 2])
    wrong, tokens, targets = filled(module, file, first, rows, seq_len, index.NO_LIMIT if dtype == "i8" else 2**33)
    assert wrong == (1 if dtype == "i8" else -1)  # the largest int64 is outside any vocabulary
    for begin, row in zip(first.tolist(), rows.tolist(), strict=True):
        assert tokens[row].tolist() == file[begin : begin + seq_len].tolist()
        assert targets[row].tolist() == file[begin + 1 : begin + seq_len + 1].tolist()
    assert (tokens[1] == -7).all() and (targets[1] == -7).all()


@pytest.mark.parametrize("module", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "bad"), [("i4", -1), ("i4", 100), ("u2", 65535), ("i1", -128)])
@pytest.mark.parametrize("place", [10, 13, 15])
def test_the_first_sample_with_a_wrong_id_is_told(module: ModuleType, dtype: str, bad: int, place: int) -> None:
    file = np.zeros(40, dtype=dtype)
    file[place] = bad
    first, rows = np.array([20, 10, 11]), np.array([0, 1, 2])
    assert filled(module, file, first, rows, 5, 100)[0] == 1
    assert filled(module, file, np.array([16, 0]), np.array([0, 1]), 9, 100)[0] == (-1 if place > 9 else 1)
    file[place] = 99
    assert filled(module, file, first, rows, 5, 100)[0] == -1


@pytest.mark.parametrize("module", IMPLEMENTATIONS)
@pytest.mark.parametrize("seq_len", [1, 2, 7, 64])
def test_documents_are_told_apart(module: ModuleType, seq_len: int) -> None:
    rng = np.random.default_rng(seq_len)
    starts = np.unique(np.concatenate([[0, 1, 2], rng.integers(0, 300, 40), [250]]))
    first = rng.integers(0, 300, 50)
    rows = rng.permutation(50)
    documents, positions = np.full((50, seq_len), -7, np.int32), np.full((50, seq_len), -7)
    module.mark_documents(starts, first, rows, documents, positions)
    for begin, row in zip(first.tolist(), rows.tolist(), strict=True):
        owner = [int(np.searchsorted(starts, place, side="right")) for place in range(begin, begin + seq_len)]
        assert documents[row].tolist() == [one - owner[0] for one in owner]
        assert positions[row].tolist() == [place - owner.index(one) for place, one in enumerate(owner)]
    assert seq_len == 1 or documents.max() > 0  # negative control: there are boundaries


@needs_native
def test_the_compiled_index_refuses_what_would_leave_the_arrays() -> None:
    file, good = np.zeros(10, np.uint16), np.zeros((2, 4), np.int64)
    one, zero = np.array([1]), np.array([0])
    assert native.gather_tokens(file, np.array([5]), one, 9, good, good.copy()) == -1
    for first, row in ((np.array([6]), zero), (np.array([-1]), zero), (zero, np.array([2])), (zero, np.array([-1]))):
        with pytest.raises(ValueError, match=r"sample|row"):
            native.gather_tokens(file, first, row, 9, good, good.copy())
    with pytest.raises(TypeError):  # a conversion would fill a copy
        native.gather_tokens(file, zero, zero, 9, good.astype(np.int32), good)
    with pytest.raises(ValueError, match="dtype"):
        native.gather_tokens(file.astype(np.float64), zero, zero, 9, good, good.copy())


def test_without_the_compiled_index_numpy_serves_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def absent(name: str) -> ModuleType:
        raise ImportError(f"no module {name}")

    monkeypatch.setattr(index.importlib, "import_module", absent)
    index.implementation.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                assert index.implementation() is index_reference
            assert index.permutation(5, 1, 2).tolist() == index_reference.permutation(5, 1, 2, 0).tolist()
        assert len(caplog.records) == 1 and "numpy" in caplog.text and "pip install" in caplog.text
    finally:
        index.implementation.cache_clear()
