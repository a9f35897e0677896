"""The functions of csrc/data in numpy: the specification, and what runs where the compiled module is missing.

`megatron_lite.data.index` describes them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def permutation(num_samples: int, seed: int, epoch: int, source: int) -> NDArray[np.int64]:
    philox = np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=np.array([0, 0, 0, source], np.uint64))
    words = philox.random_raw(num_samples)
    # The low bits carry the sample's number: no two words are equal, so every sorting algorithm gives the same
    # result, and sorting words in place is several times as fast as an argsort.
    low = np.uint64((1 << (num_samples - 1).bit_length()) - 1)
    words &= ~low
    words |= np.arange(num_samples, dtype=np.uint64)
    words.sort()
    words &= low
    return words.view(np.int64)


def fill_blend(shares: NDArray[np.int64], counts: NDArray[np.int64], sources: NDArray[np.uint16]) -> None:
    # Python's integers: a count times the total does not fit into 64 bits.
    share, taken = shares.tolist(), counts.tolist()
    total, first = sum(share), sum(taken)
    starts = [count * total // part for count, part in zip(taken, share, strict=True)]
    deadlines = [-(-(count + 1) * total // part) for count, part in zip(taken, share, strict=True)]
    everyone = range(len(share))
    for number in range(len(sources)):
        best = min((s for s in everyone if starts[s] <= first + number), key=deadlines.__getitem__)
        taken[best] += 1
        starts[best] = taken[best] * total // share[best]
        deadlines[best] = -(-(taken[best] + 1) * total // share[best])
        sources[number] = best
    counts[:] = taken


def gather_tokens(
    file: NDArray[Any],
    first: NDArray[np.int64],
    rows: NDArray[np.int64],
    vocab_size: int,
    tokens: NDArray[np.int64],
    targets: NDArray[np.int64],
) -> int:
    wrong, seq_len = -1, tokens.shape[1]
    for number, (begin, row) in enumerate(zip(first.tolist(), rows.tolist(), strict=True)):
        sample = file[begin : begin + seq_len + 1]
        tokens[row], targets[row] = sample[:-1], sample[1:]
        if wrong < 0 and not (int(sample.min()) >= 0 and int(sample.max()) < vocab_size):
            wrong = number
    return wrong


def mark_documents(
    starts: NDArray[np.int64],
    first: NDArray[np.int64],
    rows: NDArray[np.int64],
    documents: NDArray[np.int32],
    positions: NDArray[np.int64],
) -> None:
    seq_len = documents.shape[1]
    places = np.arange(seq_len)
    nearest = np.searchsorted(starts, first, side="right").tolist()
    behind = np.searchsorted(starts, first + seq_len, side="left").tolist()
    for begin, row, low, high in zip(first.tolist(), rows.tolist(), nearest, behind, strict=True):
        begins = np.zeros(seq_len, dtype=np.int64)
        begins[starts[low:high] - begin] = 1
        documents[row] = np.cumsum(begins)
        positions[row] = places - np.maximum.accumulate(places * begins)
