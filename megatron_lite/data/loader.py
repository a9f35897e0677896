"""The microbatches of one data-parallel rank, as tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from megatron_lite.data.dataset import Sample, TokenDataset
from megatron_lite.data.order import SampleOrder, batch_indices
from megatron_lite.ops.linear_cross_entropy import IGNORED_TARGET


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

    With `prefetch`, a thread reads the next step while this one is computed; an error in it is raised by the call
    that asks for that step.

    Raises:
        ValueError: the global batch is no multiple of micro_batch_size * dp.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        order: SampleOrder,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        dp: int = 1,
        dp_rank: int = 0,
        prefetch: bool = False,
    ) -> None:
        assert order.num_samples == len(dataset), (order.num_samples, len(dataset))
        self.dataset = dataset
        self.order = order
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.dp = dp
        self.dp_rank = dp_rank
        self._indices(0)  # a batch that does not divide is refused here, not at the first step
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="prefetch") if prefetch else None
        self._next: tuple[int, Future[list[Microbatch]]] | None = None

    @property
    def num_microbatches(self) -> int:
        """Microbatches that each rank computes in a step."""
        return self.global_batch_size // (self.micro_batch_size * self.dp)

    def batch(self, step: int) -> list[Microbatch]:
        """This rank's microbatches of global batch `step` (from 0), [micro_batch_size, S] each.

        Raises:
            DataError: a token id outside the dataset's vocabulary.
        """
        if self._reader is None:
            return self._read(step)
        pending, self._next = self._next, None
        if pending is not None and pending[0] == step:
            microbatches = pending[1].result()
        else:
            microbatches = self._reader.submit(self._read, step).result()
        self._next = (step + 1, self._reader.submit(self._read, step + 1))
        return microbatches

    def num_eval_batches(self, num: int) -> int:
        """How many of `num` evaluation batches the dataset can fill, at least in part."""
        return min(num, -(-len(self.dataset) // self.global_batch_size))

    def eval_batches(self, num: int) -> Iterator[list[Microbatch]]:
        """This rank's microbatches of the first `num` global batches in the order of the file, each sample once.

        Where the dataset ends before the last batch is full, fillers take the missing places, so that every rank
        runs the same microbatches; all targets of a filler are `IGNORED_TARGET`.
        """
        for step in range(self.num_eval_batches(num)):
            yield [self._microbatch(places) for places in self._indices(step)]

    def close(self) -> None:
        """Stop the prefetching thread."""
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)
            self._reader, self._next = None, None

    def _indices(self, step: int) -> list[range]:
        return batch_indices(step, self.global_batch_size, self.dp, self.dp_rank, self.micro_batch_size)

    def _read(self, step: int) -> list[Microbatch]:
        return [self._microbatch([self.order[k] for k in places]) for places in self._indices(step)]

    def _microbatch(self, indices: Sequence[int]) -> Microbatch:
        """The samples `indices` side by side; an index past the end of the dataset is a filler."""
        last = len(self.dataset) - 1
        samples = [self.dataset.sample(min(index, last)) for index in indices]
        tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
        # Contiguous: a view of [B, S + 1] would make every consumer that flattens it copy. The targets are a copy even
        # where one row is contiguous as it is, for fillers are written into them.
        targets = tokens[:, 1:].clone(memory_format=torch.contiguous_format)
        for row, index in enumerate(indices):
            if index > last:
                targets[row] = IGNORED_TARGET
        documents, positions = _stack_documents(samples)
        return Microbatch(tokens[:, :-1].contiguous(), targets, documents, positions)


def _stack_documents(samples: Sequence[Sample]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    documents = [sample.document_ids for sample in samples if sample.document_ids is not None]
    positions = [sample.positions for sample in samples if sample.positions is not None]
    if not documents:
        return None, None
    return torch.from_numpy(np.stack(documents)), torch.from_numpy(np.stack(positions))
