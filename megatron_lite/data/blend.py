"""Several sources with weights: which sample of which source comes k-th, as a pure function of k."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.cache import IndexCache
from megatron_lite.data.dataset import SampleRows, TokenDataset
from megatron_lite.data.index import fill_blend
from megatron_lite.data.order import SampleOrder

BLOCK = 1 << 14  # places whose sources are computed together, from the counts at the first of them
_TOTAL = 1 << 40  # of the shares: after 10**9 samples a rounded weight is wrong by a thousandth of a sample
MAX_SOURCES = 1 << 16


def integer_shares(weights: Sequence[float]) -> NDArray[np.int64]:
    """Weights (positive) as integers int64 [n] in their proportions, with the sum 2**40."""
    exact = [Fraction(weight) for weight in weights]
    assert exact and all(weight > 0 for weight in exact) and len(exact) <= MAX_SOURCES, weights
    shares = [max(1, round(weight * _TOTAL / sum(exact))) for weight in exact]
    shares[shares.index(max(shares))] += _TOTAL - sum(shares)
    return np.array(shares, dtype=np.int64)


class BlendedDataset:
    """The samples of several sources, numbered one source after the other."""

    def __init__(self, sources: Sequence[TokenDataset]) -> None:
        assert len({(source.seq_len, source.isolate_documents) for source in sources}) == 1, "sources of one kind"
        self.sources = tuple(sources)
        self.seq_len = sources[0].seq_len
        self.isolate_documents = sources[0].isolate_documents
        self.first_ids: NDArray[np.int64] = np.cumsum([0, *(len(source) for source in sources)])

    def __len__(self) -> int:
        return int(self.first_ids[-1])

    def fill(self, ids: NDArray[np.int64], rows: NDArray[np.int64], out: SampleRows) -> None:
        """As `TokenDataset.fill`."""
        source_of = np.searchsorted(self.first_ids, ids, side="right") - 1
        for source in np.unique(source_of).tolist():
            chosen = source_of == source
            self.sources[source].fill(ids[chosen] - self.first_ids[source], rows[chosen], out)


class BlendedOrder:
    """Which sample of a `BlendedDataset` is read k-th, for any k >= 0.

    Every prefix of the blend holds of each source what its weight asks for, to within one sample (see
    `megatron_lite.data.index.fill_blend`). Each source is read in its own order, with epochs and shuffles of its own.

    orders: of each source, in the order of the dataset. weights: positive, of any sum. num_planned: how many samples
    a run is going to read; what that takes is computed once and kept in the cache.
    """

    def __init__(
        self,
        orders: Sequence[SampleOrder],
        weights: Sequence[float],
        *,
        num_planned: int = 0,
        cache: IndexCache | None = None,
    ) -> None:
        assert len(orders) == len(weights), (len(orders), len(weights))
        self.orders = tuple(orders)
        self.shares = integer_shares(weights)
        self.first_ids: NDArray[np.int64] = np.cumsum([0, *(order.num_samples for order in orders)])
        num_blocks = num_planned // BLOCK + 1
        self._counts: NDArray[np.int64] = (cache or IndexCache(())).array(
            "blend",
            {"shares": self.shares.tolist()},
            {"blocks": num_blocks},
            lambda: self._count_blocks(num_blocks),
            entries=num_planned,
        )
        self._reached = (num_blocks - 1, self._counts[-1])  # the last block whose counts are known
        self._block = (-1, self._counts[0], np.empty(0, np.uint16))  # number, counts at its first place, sources

    @property
    def num_samples(self) -> int:
        """Samples of all sources, each counted once."""
        return int(self.first_ids[-1])

    def ids(self, first: int, count: int) -> NDArray[np.int64]:
        """The samples that are read first-th and following, int64 [count]."""
        if first < 0:
            raise IndexError(f"samples are counted from 0, got {first}")
        parts = []
        while count > 0:
            number, place = divmod(first, BLOCK)
            counts, sources = self._sources(number)
            part = sources[place : place + count]
            parts.append(self._ids_of(counts + self._tally(sources[:place]), part))
            first, count = first + len(part), count - len(part)
        return np.concatenate([np.empty(0, np.int64), *parts])

    def _ids_of(self, counts: NDArray[np.int64], sources: NDArray[np.uint16]) -> NDArray[np.int64]:
        """The samples at places with these sources, of which `counts` [n] were read before."""
        result = np.empty(len(sources), dtype=np.int64)
        for source in np.unique(sources).tolist():
            chosen = sources == source
            own = self.orders[source].ids(int(counts[source]), int(np.count_nonzero(chosen)))
            result[chosen] = own + self.first_ids[source]
        return result

    def _sources(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.uint16]]:
        """What was read of each source before block `number`, int64 [n], and the sources of its places, [BLOCK]."""
        known, counts, sources = self._block  # read once: a prefetching thread may replace it
        if known != number:
            counts = self._counts_before(number)
            sources = np.empty(BLOCK, dtype=np.uint16)
            after = counts.copy()
            fill_blend(self.shares, after, sources)
            self._block = (number, counts, sources)
            self._reached = max(self._reached, (number + 1, after), key=lambda reached: reached[0])
        return counts, sources

    def _counts_before(self, number: int) -> NDArray[np.int64]:
        if number < len(self._counts):
            return self._counts[number]
        at, counts = self._reached
        if at > number:  # a step back, behind what was planned
            at, counts = len(self._counts) - 1, self._counts[-1]
        counts, scratch = counts.copy(), np.empty(BLOCK, dtype=np.uint16)
        for _ in range(at, number):
            fill_blend(self.shares, counts, scratch)
        return counts

    def _count_blocks(self, num_blocks: int) -> NDArray[np.int64]:
        counts = np.zeros((num_blocks, len(self.shares)), dtype=np.int64)
        scratch = np.empty(BLOCK, dtype=np.uint16)
        for number in range(1, num_blocks):
            counts[number] = counts[number - 1]
            fill_blend(self.shares, counts[number], scratch)
        return counts

    def _tally(self, sources: NDArray[np.uint16]) -> NDArray[np.int64]:
        return np.bincount(sources, minlength=len(self.shares))
