"""The benchmark of tokenising runs, and measures what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import tokenizing
from megatron_lite.data.documents import iter_documents
from megatron_lite.data.sources import look_at


def test_texts_are_as_large_as_asked_and_all_different() -> None:
    texts = tokenizing.texts_of_size(30_000_000)
    assert 30_000_000 <= sum(len(text.encode()) for text in texts) < 31_000_000
    assert len(set(texts)) > 0.99 * len(texts)


@pytest.mark.parametrize("compression", ["", "gz", "zst"])
def test_both_sides_get_the_same_texts(tmp_path: Path, compression: str) -> None:
    texts = tokenizing.texts_of_size(100_000)
    path = tokenizing.write_lines(tmp_path, texts, compression)
    assert [document.held() for document in iter_documents([look_at(path)])] == [text.encode() for text in texts]


def test_it_measures(capsys: pytest.CaptureFixture[str]) -> None:
    ratio = tokenizing.measure(0.2, rounds=1, vocab_size=300, compression="")
    shown = capsys.readouterr().out
    assert ratio > 0 and f"ratio {ratio:.3f}" in shown
    assert "round 1: tokenizers" in shown and "M tokens/s" in shown
