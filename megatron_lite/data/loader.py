"""The microbatches of one data-parallel rank, as tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_lite.data.dataset import SampleRows, Samples
from megatron_lite.data.order import Order, batch_indices
from megatron_lite.ops.cross_entropy_shard import IGNORED_TARGET


@dataclass(frozen=True)
class Microbatch:
    """What one forward pass reads: tokens int64 [B, S] and targets int64 [B, S], the token that follows each.

    documents int32 [B, S] and positions int64 [B, S] are None unless documents are isolated. Targets of
    `IGNORED_TARGET` do not count.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    documents: torch.Tensor | None = None
    positions: torch.Tensor | None = None


class BatchLoader:
    """Gives data-parallel rank `dp_rank` its part of any global batch.

    With `prefetch`, a thread reads the next global batch while this one is computed; an error in it is raised by the
    call that asks for that batch.

    batch_size_at: sequences of the global batch that begins after so many samples, where that is not always
    `global_batch_size`; evaluations take global batches of that size in any case.

    Raises:
        ValueError: the global batch is no multiple of micro_batch_size * dp.
    """

    def __init__(
        self,
        dataset: Samples,
        order: Order,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        dp: int = 1,
        dp_rank: int = 0,
        prefetch: bool = False,
        batch_size_at: Callable[[int], int] | None = None,
    ) -> None:
        assert order.num_samples == len(dataset), (order.num_samples, len(dataset))
        self.dataset = dataset
        self.order = order
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.dp = dp
        self.dp_rank = dp_rank
        self._batch_size_at = batch_size_at or (lambda consumed: global_batch_size)
        self._places(0, global_batch_size)  # a batch that does not divide is refused here, not at the first step
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="prefetch") if prefetch else None
        self._next: tuple[int, Future[list[Microbatch]]] | None = None

    @property
    def num_microbatches(self) -> int:
        """Microbatches that each rank computes in a step of full size."""
        return self.global_batch_size // (self.micro_batch_size * self.dp)

    def batch(self, consumed: int) -> list[Microbatch]:
        """This rank's microbatches of the global batch that begins at sample `consumed`, [micro_batch_size, S] each.

        consumed: samples that were read before, over all ranks and epochs.

        Raises:
            DataError: a token id outside the dataset's vocabulary.
        """
        if self._reader is None:
            return self._read(consumed)
        pending, self._next = self._next, None
        if pending is not None and pending[0] == consumed:
            microbatches = pending[1].result()
        else:
            microbatches = self._reader.submit(self._read, consumed).result()
        following = consumed + self._batch_size_at(consumed)
        self._next = (following, self._reader.submit(self._read, following))
        return microbatches

    def num_eval_batches(self, num: int) -> int:
        """How many of `num` evaluation batches the dataset can fill, at least in part."""
        return min(num, -(-len(self.dataset) // self.global_batch_size))

    def eval_batches(self, num: int) -> Iterator[list[Microbatch]]:
        """This rank's microbatches of the first `num` global batches in the order of the file, each sample once.

        Where the dataset ends before the last batch is full, fillers take the missing places, so that every rank
        runs the same microbatches; all targets of a filler are `IGNORED_TARGET`.
        """
        for number in range(self.num_eval_batches(num)):
            yield self._microbatches(np.array(self._places(number * self.global_batch_size, self.global_batch_size)))

    def close(self) -> None:
        """Stop the prefetching thread."""
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)
            self._reader, self._next = None, None

    def sample_ids(self, consumed: int) -> NDArray[np.int64]:
        """The samples of the global batch at `consumed` that this rank reads, int64 [microbatches, B of each]."""
        places = self._places(consumed, self._batch_size_at(consumed))
        ids = self.order.ids(places[0].start, places[-1].stop - places[0].start)
        return ids.reshape(len(places), self.micro_batch_size)

    def _places(self, consumed: int, batch_size: int) -> list[range]:
        return batch_indices(consumed, batch_size, self.dp, self.dp_rank, self.micro_batch_size)

    def _read(self, consumed: int) -> list[Microbatch]:
        return self._microbatches(self.sample_ids(consumed))

    def _microbatches(self, ids: NDArray[np.int64]) -> list[Microbatch]:
        """The samples `ids` [microbatches, B]; an id past the end of the dataset is a filler.

        All are read into one array, whose parts are the microbatches: contiguous, so that no consumer copies.
        """
        flat, last = ids.reshape(-1), len(self.dataset) - 1
        out = SampleRows.empty(len(flat), self.dataset.seq_len, self.dataset.isolate_documents)
        self.dataset.fill(np.minimum(flat, last), np.arange(len(flat)), out)
        out.targets[flat > last] = IGNORED_TARGET

        def split(array: NDArray[Any] | None) -> Sequence[Any]:
            return torch.from_numpy(array).split(ids.shape[1]) if array is not None else [None] * len(ids)

        return list(map(Microbatch, *map(split, (out.tokens, out.targets, out.documents, out.positions))))
