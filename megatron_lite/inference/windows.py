"""A stream of tokens, cut into windows in which every token is scored once; and windows, packed into microbatches.

stream   P a b c d e f g h        P: what comes before the first token, or nothing (then `a` is context alone)
window   P a b c -> a b c d       seq_len 4, stride 4: what is scored stands behind the arrow
         d e f g -> e f g h
window   P a b c -> a b c d       seq_len 4, stride 2: the second half of each window but the first
         b c d e ->     e f
         d e f g ->     g h
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_lite.data import Microbatch
from megatron_lite.ops.cross_entropy_shard import IGNORED_TARGET

# Microbatches that enter a pipeline together. It does not depend on the layout, and so neither do their shapes.
GROUP = 16


@dataclass(frozen=True)
class Window:
    """tokens: int64 ``[L + 1]``, L inputs and the token after each. num_context: targets at its start not scored."""

    tokens: NDArray[np.int64]
    num_context: int

    @property
    def num_inputs(self) -> int:
        return len(self.tokens) - 1

    @property
    def num_scored(self) -> int:
        return self.num_inputs - self.num_context


def cut_windows(chunks: Iterable[NDArray[np.int64]], seq_len: int, stride: int) -> Iterator[Window]:
    """The windows of one stream of tokens, of at most ``seq_len`` inputs each; of a single token there is none.

    Every token but the first is scored once, and all but those of the first window with at least
    ``seq_len - stride + 1`` tokens in front of it. chunks: the stream in pieces of any length, of which a few are held
    at a time. 1 <= stride <= seq_len.
    """
    assert 1 <= stride <= seq_len, (stride, seq_len)
    held, num_context = np.zeros(0, dtype=np.int64), 0
    for chunk in chunks:
        held = np.concatenate([held, chunk])
        start = 0
        while len(held) - start > seq_len:
            yield Window(held[start : start + seq_len + 1], num_context)
            start, num_context = start + stride, seq_len - stride
        held = held[start:]
    if len(held) - 1 > num_context:
        yield Window(held, num_context)


def pack_rows(windows: Iterable[Window], seq_len: int) -> Iterator[list[Window]]:
    """Windows side by side, in their order, as many in a row as fit into ``seq_len`` inputs."""
    row: list[Window] = []
    for window in windows:
        if row and sum(one.num_inputs for one in row) + window.num_inputs > seq_len:
            yield row
            row = []
        row.append(window)
    if row:
        yield row


def group_microbatches(
    rows: Iterable[list[Window]], rows_per_microbatch: int, device: torch.device
) -> Iterator[list[Microbatch]]:
    """Up to ``GROUP`` microbatches of one shape at a time, as one run of a schedule takes them."""
    source = iter(rows)
    while group := list(islice(source, rows_per_microbatch * GROUP)):
        height = min(rows_per_microbatch, len(group))
        group += [[]] * (-len(group) % height)
        width = max(sum(window.num_inputs for window in row) for row in group)
        is_packed = any(len(row) > 1 for row in group)
        yield [
            _microbatch(group[first : first + height], width, is_packed, device)
            for first in range(0, len(group), height)
        ]


def _microbatch(rows: Sequence[list[Window]], width: int, is_packed: bool, device: torch.device) -> Microbatch:
    """``[len(rows), width]``; where a row has several windows, each is a document of its own, and so is the filling."""
    shape = (len(rows), width)
    tokens, documents = np.zeros(shape, dtype=np.int64), np.full(shape, -1, dtype=np.int32)
    targets = np.full(shape, IGNORED_TARGET, dtype=np.int64)
    positions = np.tile(np.arange(width), (len(rows), 1))
    for number, row in enumerate(rows):
        start = 0
        for document, window in enumerate(row):
            stop = start + window.num_inputs
            tokens[number, start:stop] = window.tokens[:-1]
            targets[number, start + window.num_context : stop] = window.tokens[1 + window.num_context :]
            documents[number, start:stop] = document
            positions[number, start:stop] = np.arange(window.num_inputs)
            start = stop
        positions[number, start:] = np.arange(width - start)

    def put(values: NDArray[np.int64] | NDArray[np.int32]) -> torch.Tensor:
        return torch.from_numpy(values).to(device)

    return Microbatch(
        put(tokens), put(targets), put(documents) if is_packed else None, put(positions) if is_packed else None
    )
