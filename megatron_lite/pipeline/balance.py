"""How many layers each chunk gets, so that the ranks have as equal work as whole layers allow. Pure arithmetic.

A step takes at least as long as the rank with the most work. So the largest rank is made small first; the largest chunk
second, because what fills and drains a pipeline is as long as its longest chunk; then the rest as even as can be.

Three cases, and what is promised in each:

- a rank holds one chunk: the minimum, by dynamic programming (the linear partition problem);
- all layers of a rank cost the same: the minimum, by counting, however many chunks a rank holds;
- several chunks a rank and layers that differ (sliding windows, measured costs): here the ranks' sums couple chunks
  that lie far apart, and a dynamic program would need a state for every combination of sums. The exact minimum of the
  largest *chunk*, and the split for layers of the mean cost, are taken as starts, and layers are moved between chunks
  while that helps. Never worse than either start; that nothing is better is not promised.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise, permutations
from statistics import fmean

from megatron_lite.config.layer_costs import LayerCosts
from megatron_lite.pipeline.instructions import Placement


@dataclass(frozen=True)
class _Work:
    """What chunks cost. costs: of each rank, since ranks may recompute differently."""

    costs: Sequence[LayerCosts]
    placement: Placement

    @cached_property
    def _sums(self) -> list[list[float]]:
        return [list(accumulate(of_rank.layers, initial=0.0)) for of_rank in self.costs]

    @property
    def num_layers(self) -> int:
        return len(self.costs[0].layers)

    def extra(self, chunk: int) -> float:
        """What a chunk costs besides its layers."""
        of_rank = self.costs[self.placement.rank_of[chunk]]
        head = of_rank.head if chunk == self.placement.num_chunks - 1 else 0.0
        return head + (of_rank.embedding if chunk == 0 else 0.0)

    def of_chunk(self, chunk: int, first: int, end: int) -> float:
        sums = self._sums[self.placement.rank_of[chunk]]
        return sums[end] - sums[first] + self.extra(chunk)

    def of_chunks(self, split: Sequence[int]) -> list[float]:
        ends = list(accumulate(split, initial=0))
        return [self.of_chunk(chunk, first, end) for chunk, (first, end) in enumerate(pairwise(ends))]

    def of_ranks(self, split: Sequence[int]) -> list[float]:
        ranks = [0.0] * self.placement.num_ranks
        for rank, cost in zip(self.placement.rank_of, self.of_chunks(split), strict=True):
            ranks[rank] += cost
        return ranks

    def goodness(self, split: Sequence[int]) -> tuple[float, float, float]:
        """Less is better: the largest rank, the largest chunk, and how uneven the ranks are."""
        ranks = self.of_ranks(split)
        return max(ranks), max(self.of_chunks(split)), sum(cost * cost for cost in ranks)


def split_layers(costs: Sequence[LayerCosts], placement: Placement) -> tuple[int, ...]:
    """Number of layers of each chunk, first to last, at least one each.

    costs: of each pipeline rank. Raises ValueError where there are fewer layers than chunks.
    """
    work = _Work(costs, placement)
    if work.num_layers < placement.num_chunks:
        raise ValueError(f"{work.num_layers} layers cannot fill {placement.num_chunks} chunks")
    if placement.num_chunks == placement.num_ranks:
        return _smallest_largest_chunk(work)
    if all(len(set(of_rank.layers)) == 1 for of_rank in costs):
        return _by_counting(work)
    mean = [LayerCosts((fmean(c.layers),) * work.num_layers, c.embedding, c.head) for c in costs]
    starts = (_smallest_largest_chunk(work), _by_counting(_Work(mean, placement)))
    return min((_moved(work, start) for start in starts), key=work.goodness)


def _smallest_largest_chunk(work: _Work) -> tuple[int, ...]:
    """The contiguous split with the smallest largest chunk and, among those, the smallest sum of squares."""
    num_chunks, num_layers = work.placement.num_chunks, work.num_layers
    bound = _best(work, max, float("inf"))[-1][num_layers][0]
    table = _best(work, lambda so_far, cost: so_far + cost * cost, bound)
    split, end = [], num_layers
    for chunk in reversed(range(num_chunks)):
        first = table[chunk][end][1]
        split.append(end - first)
        end = first
    return tuple(reversed(split))


def _best(work: _Work, join: Callable[[float, float], float], bound: float) -> list[list[tuple[float, int]]]:
    """``table[chunk][end]``: the least that chunks 0 to ``chunk`` come to when they hold the layers before ``end``, and
    where the last of them begins. No chunk costs more than ``bound``."""
    num_chunks, num_layers = work.placement.num_chunks, work.num_layers
    none = (float("inf"), -1)
    before = [none] * (num_layers + 1)
    before[0] = (0.0, 0)
    table = []
    for chunk in range(num_chunks):
        row = [none] * (num_layers + 1)
        for end in range(chunk + 1, num_layers - (num_chunks - chunk - 1) + 1):
            for first in reversed(range(chunk, end)):  # of equals the latest, so that the first chunks have more layers
                cost = work.of_chunk(chunk, first, end)
                if cost > bound:
                    break  # and more so from an earlier layer
                joined = join(before[first][0], cost)
                if joined < row[end][0]:
                    row[end] = (joined, first)
        table.append(row)
        before = row
    return table


class _Counted:
    """Chunks whose layers all cost the same within a rank: counts are all that matters.

    A cost that is compared is always computed by the same formula, so that rounding cannot make equal ones differ.
    """

    def __init__(self, work: _Work) -> None:
        placement, self.num_layers = work.placement, work.num_layers
        self.rank_of, self.num_chunks = placement.rank_of, placement.num_chunks
        self.each = [work.costs[rank].layers[0] for rank in placement.rank_of]
        self.extras = [work.extra(chunk) for chunk in range(placement.num_chunks)]
        chunks_of = [placement.chunks_of(rank) for rank in range(placement.num_ranks)]
        self.rank_extras = [sum(self.extras[chunk] for chunk in chunks) for chunks in chunks_of]
        self.fewest_of_rank = [len(chunks) for chunks in chunks_of]

    def chunk_cost(self, chunk: int, count: int) -> float:
        return count * self.each[chunk] + self.extras[chunk]

    def rank_cost(self, chunk: int, count: int) -> float:
        """Of the rank that holds ``chunk``, with ``count`` layers in all its chunks."""
        return count * self.each[chunk] + self.rank_extras[self.rank_of[chunk]]

    def filled(self, rank_bound: float, chunk_bound: float) -> tuple[int, ...]:
        """Layers handed out one by one, each to the rank, and in it the chunk, that costs least with it.

        That makes the largest rank as small as can be. Bounds only take receivers away: if all layers can be handed
        out within them, they are; if not, the counts add up to fewer.
        """
        counts, of_rank = [1] * self.num_chunks, list(self.fewest_of_rank)
        if any(self.chunk_cost(chunk, 1) > chunk_bound for chunk in range(self.num_chunks)):
            return ()
        for _ in range(self.num_layers - self.num_chunks):
            options = [
                (self.rank_cost(chunk, of_rank[rank] + 1), self.chunk_cost(chunk, counts[chunk] + 1), chunk)
                for chunk, rank in enumerate(self.rank_of)
            ]
            allowed = [option for option in options if option[0] <= rank_bound and option[1] <= chunk_bound]
            if not allowed:
                break
            chunk = min(allowed)[2]
            counts[chunk] += 1
            of_rank[self.rank_of[chunk]] += 1
        return tuple(counts)


def _by_counting(work: _Work) -> tuple[int, ...]:
    """Where each layer of a rank costs the same: the smallest largest rank, then the smallest largest chunk."""
    counted = _Counted(work)
    free = counted.filled(float("inf"), float("inf"))
    of_rank = [sum(free[chunk] for chunk in work.placement.chunks_of(rank)) for rank in counted.rank_of]
    rank_bound = max(counted.rank_cost(chunk, count) for chunk, count in enumerate(of_rank))
    num_layers = counted.num_layers
    counts = range(1, num_layers + 1)
    limits = sorted({counted.chunk_cost(chunk, count) for chunk in range(counted.num_chunks) for count in counts})
    fits = bisect_left(limits, True, key=lambda limit: sum(counted.filled(rank_bound, limit)) == num_layers)
    return counted.filled(rank_bound, limits[fits])


def _moved(work: _Work, split: tuple[int, ...]) -> tuple[int, ...]:
    """Takes a layer from one chunk and gives one to another, the best such move first, as long as that is better."""
    best = work.goodness(split)
    while True:
        candidate = min(_moves(work, split), key=work.goodness, default=split)
        if work.goodness(candidate) >= best:
            return split
        split, best = candidate, work.goodness(candidate)


def _moves(work: _Work, split: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Splits in which a chunk has a layer less, and one of a cheaper rank one more; those between them shift by one."""
    ranks = work.of_ranks(split)
    of_chunk = [ranks[rank] for rank in work.placement.rank_of]
    for giver, taker in permutations(range(len(split)), 2):
        if split[giver] > 1 and of_chunk[taker] <= of_chunk[giver]:
            yield tuple(count - (chunk == giver) + (chunk == taker) for chunk, count in enumerate(split))
