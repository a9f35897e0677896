"""Which sample comes k-th, and which rank reads it: pure functions of integers.

The order of the data is a function of (seed, samples consumed). A layout only decides who reads which part of a
global batch, so a run may change its layout, or stop and resume, and goes on with the very next sample.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.cache import IndexCache
from megatron_lite.data.index import permutation


class Order(Protocol):
    """`ids(first, count)`: the samples that are read first-th and following, int64 [count], for any first >= 0."""

    @property
    def num_samples(self) -> int: ...

    def ids(self, first: int, count: int) -> NDArray[np.int64]: ...


class SampleOrder:
    """`order[k]` is the sample that is read k-th, counted over all epochs, for any k >= 0.

    Epoch e = k // num_samples visits every sample once, in a permutation that depends on (seed, source, e) only (see
    `megatron_lite.data.index.permutation`); with `shuffle=False`, every epoch is 0, 1, 2, ....

    source: the number of the source in a blend, so that sources of one size are not shuffled alike.

    Raises:
        ValueError: num_samples < 1, or a seed outside 0 .. 2**64 - 1.
    """

    def __init__(
        self, num_samples: int, seed: int, shuffle: bool = True, *, source: int = 0, cache: IndexCache | None = None
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}, an order needs at least 1 sample")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}, it must lie in 0 .. 2**64 - 1")
        self.num_samples = num_samples
        self.seed = seed
        self.shuffle = shuffle
        self.source = source
        self._cache = cache or IndexCache(())
        # The last two that were asked for: a batch may lie across the end of an epoch.
        self._epochs: tuple[tuple[int, NDArray[np.int64]], ...] = ()

    def __getitem__(self, consumed: int) -> int:
        return int(self.ids(consumed, 1)[0])

    def ids(self, first: int, count: int) -> NDArray[np.int64]:
        """The samples that are read first-th and following, int64 [count].

        Raises:
            IndexError: first < 0.
        """
        if first < 0:
            raise IndexError(f"samples are counted from 0, got {first}")
        if not self.shuffle:
            return np.arange(first, first + count) % self.num_samples
        result = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            epoch, place = divmod(first + done, self.num_samples)
            part = self.permutation(epoch)[place : place + count - done]
            result[done : done + len(part)] = part
            done += len(part)
        return result

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """The shuffled samples int64 [num_samples] of one epoch."""
        epochs = self._epochs  # read once: a prefetching thread may replace it
        for known, samples in epochs:
            if known == epoch:
                return samples
        samples = self._cache.array(
            "order",
            {"num_samples": self.num_samples, "seed": self.seed, "source": self.source},
            {"epoch": epoch},  # a later epoch takes the place of an earlier one, so that a long run fills no disk
            lambda: permutation(self.num_samples, self.seed, epoch, self.source),
            entries=self.num_samples,
        )
        self._epochs = (*epochs[-1:], (epoch, samples))
        return samples


def batch_indices(consumed: int, global_batch_size: int, dp: int, dp_rank: int, micro_batch_size: int) -> list[range]:
    """What data-parallel rank `dp_rank` reads after `consumed` samples, as places k in the order, a range a microbatch.

    The global batch is the places consumed .. consumed + B - 1, and rank d takes the contiguous part
    d * B / dp .. (d + 1) * B / dp - 1 of it.

    Raises:
        ValueError: the global batch is no multiple of micro_batch_size * dp.
    """
    assert consumed >= 0 and 0 <= dp_rank < dp, (consumed, dp_rank, dp)
    if micro_batch_size < 1 or global_batch_size < 1 or global_batch_size % (micro_batch_size * dp):
        unit = max(1, micro_batch_size) * dp
        nearest = max(unit, round(global_batch_size / unit) * unit)
        raise ValueError(
            f"global_batch_size {global_batch_size} is no multiple of micro_batch_size {micro_batch_size} x dp {dp}; "
            f"the nearest that is: {nearest}"
        )
    share = global_batch_size // dp
    first = consumed + dp_rank * share
    return [range(start, start + micro_batch_size) for start in range(first, first + share, micro_batch_size)]
