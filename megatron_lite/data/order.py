"""Which sample comes k-th, and which rank reads it: pure functions of integers.

The order of the data is a function of (seed, samples consumed). A layout only decides who reads which part of a
global batch, so a run may change its layout, or stop and resume, and goes on with the very next sample.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class SampleOrder:
    """`order[k]` is the sample that is read k-th, counted over all epochs, for any k >= 0.

    Epoch e = k // num_samples visits every sample once, in a permutation that depends on (seed, e) only; with
    `shuffle=False`, every epoch is 0, 1, 2, ....

    The permutation sorts the samples by the first num_samples 64-bit words of the counter-based generator Philox
    4x64-10 under the key (seed, e) (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3).
    The raw words are fixed by the paper, whereas numpy may change from release to release what it makes of them in
    `Generator.permutation`.

    Raises:
        ValueError: num_samples < 1, or a seed outside 0 .. 2**64 - 1.
    """

    def __init__(self, num_samples: int, seed: int, shuffle: bool = True) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}, an order needs at least 1 sample")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}, it must lie in 0 .. 2**64 - 1")
        self.num_samples = num_samples
        self.seed = seed
        self.shuffle = shuffle
        self._epoch: tuple[int, NDArray[np.int64]] | None = None

    def __getitem__(self, consumed: int) -> int:
        if consumed < 0:
            raise IndexError(f"samples are counted from 0, got {consumed}")
        epoch, place = divmod(consumed, self.num_samples)
        return int(self.permutation(epoch)[place]) if self.shuffle else place

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """The shuffled samples int64 [num_samples] of one epoch; the last one asked for is kept."""
        cached = self._epoch  # read once: a prefetching thread may replace it
        if cached is None or cached[0] != epoch:
            key = np.array([self.seed, epoch], dtype=np.uint64)
            words = np.random.Philox(key=key).random_raw(self.num_samples)
            # The low bits carry the sample's number: no two words are equal, so every sorting algorithm gives the
            # same result, and sorting words in place is several times as fast as an argsort.
            low = np.uint64((1 << (self.num_samples - 1).bit_length()) - 1)
            words &= ~low
            words |= np.arange(self.num_samples, dtype=np.uint64)
            words.sort()
            words &= low
            cached = self._epoch = (epoch, words.view(np.int64))
        return cached[1]


def batch_indices(step: int, global_batch_size: int, dp: int, dp_rank: int, micro_batch_size: int) -> list[range]:
    """What data-parallel rank `dp_rank` reads at `step` (from 0), as places k in the order: one range a microbatch.

    Global batch `step` is the places step * B .. (step + 1) * B - 1, and rank d takes the contiguous part
    d * B / dp .. (d + 1) * B / dp - 1 of it.

    Raises:
        ValueError: the global batch is no multiple of micro_batch_size * dp.
    """
    assert step >= 0 and 0 <= dp_rank < dp, (step, dp_rank, dp)
    if micro_batch_size < 1 or global_batch_size < 1 or global_batch_size % (micro_batch_size * dp):
        unit = max(1, micro_batch_size) * dp
        nearest = max(unit, round(global_batch_size / unit) * unit)
        raise ValueError(
            f"global_batch_size {global_batch_size} is no multiple of micro_batch_size {micro_batch_size} x dp {dp}; "
            f"the nearest that is: {nearest}"
        )
    share = global_batch_size // dp
    first = step * global_batch_size + dp_rank * share
    return [range(start, start + micro_batch_size) for start in range(first, first + share, micro_batch_size)]
