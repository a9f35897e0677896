"""How a text is cut into windows and packed into microbatches: every token scored once, with the context promised."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from megatron_lite.inference.windows import GROUP, Window, cut_windows, group_microbatches, pack_rows
from megatron_lite.ops.cross_entropy_shard import IGNORED_TARGET

CPU = torch.device("cpu")


def chunks_of(count: int, rng: random.Random) -> list[np.ndarray]:
    """0 .. count - 1 in pieces of random lengths, empty ones among them."""
    cuts = sorted(rng.randint(0, count) for _ in range(rng.randint(0, 5)))
    return np.split(np.arange(count), cuts)


def letters(window: Window) -> tuple[str, str]:
    text = "".join("Pabcdefgh"[token] for token in window.tokens)
    return text[:-1], text[1 + window.num_context :]


def test_the_example_of_the_module() -> None:
    stream = [np.arange(9)]
    assert list(map(letters, cut_windows(stream, 4, 4))) == [("Pabc", "abcd"), ("defg", "efgh")]
    assert list(map(letters, cut_windows(stream, 4, 2))) == [("Pabc", "abcd"), ("bcde", "ef"), ("defg", "gh")]


@pytest.mark.parametrize("seed", range(200))
def test_each_token_is_scored_once_with_its_context(seed: int) -> None:
    rng = random.Random(seed)
    count, seq_len = rng.randint(0, 60), rng.randint(1, 12)
    stride = rng.randint(1, seq_len)
    windows = list(cut_windows(chunks_of(count, rng), seq_len, stride))
    scored = []
    for number, window in enumerate(windows):
        assert 1 <= window.num_inputs <= seq_len and window.num_scored >= 1
        assert np.array_equal(window.tokens, np.arange(window.tokens[0], window.tokens[0] + len(window.tokens)))
        scored += window.tokens[1 + window.num_context :].tolist()
        if number:
            assert window.num_context == seq_len - stride
    assert scored == list(range(1, count))


@pytest.mark.parametrize("seed", range(50))
def test_packing_keeps_every_window_whole_and_apart(seed: int) -> None:
    rng = random.Random(seed)
    seq_len, height = rng.randint(2, 12), rng.randint(1, 4)
    windows, first = [], 0
    for _ in range(rng.randint(1, 3 * GROUP)):
        length = rng.randint(1, seq_len)
        windows.append(Window(np.arange(first, first + length + 1), rng.randint(0, length - 1)))
        first += length + 1
    rows = list(pack_rows(iter(windows), seq_len))
    assert [window for row in rows for window in row] == windows
    found: dict[int, tuple[int, int]] = {}  # target -> its input, and the position of that
    for microbatches in group_microbatches(rows, height, CPU):
        assert len({batch.tokens.shape for batch in microbatches}) == 1 and len(microbatches) <= GROUP
        for batch in microbatches:
            assert batch.tokens.shape[0] <= height and batch.tokens.shape[1] <= seq_len
            _collect(batch, found)
    expected = {
        int(token): (int(token) - 1, place)
        for window in windows
        for place, token in enumerate(window.tokens[1:])
        if place >= window.num_context
    }
    assert found == expected


def _collect(batch, found: dict[int, tuple[int, int]]) -> None:  # type: ignore[no-untyped-def]
    """What is scored, and that a token sees no other window: documents and positions change where windows do."""
    width = batch.tokens.shape[1]
    positions = torch.arange(width).expand_as(batch.tokens) if batch.positions is None else batch.positions
    for row, column in torch.nonzero(batch.targets != IGNORED_TARGET).tolist():
        target, token = int(batch.targets[row, column]), int(batch.tokens[row, column])
        assert target not in found
        found[target] = (token, int(positions[row, column]))
        start = column - int(positions[row, column])
        assert batch.tokens[row, start : column + 1].tolist() == list(range(token - (column - start), token + 1))
        if batch.documents is None:
            assert start == 0
        else:
            own = batch.documents[row] == batch.documents[row, column]
            assert own[start : column + 1].all() and not own[:start].any()


def test_full_windows_need_no_mask() -> None:
    rows = list(pack_rows(cut_windows([np.arange(41)], 8, 8), 8))
    ((*microbatches,),) = group_microbatches(rows, 2, CPU)
    assert [tuple(batch.tokens.shape) for batch in microbatches] == [(2, 8)] * 3
    assert all(batch.documents is None and batch.positions is None for batch in microbatches)
    assert (microbatches[-1].targets[1] == IGNORED_TARGET).all(), "a filler"
