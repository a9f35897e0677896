"""Batches that grow read the same samples in the same order; where a batch begins decides how large it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_lite.data.dataset import TokenDataset
from megatron_lite.data.indexed import IndexedWriter
from megatron_lite.data.loader import BatchLoader
from megatron_lite.data.order import SampleOrder

SEQ_LEN = 4
SIZES = {0: 4, 4: 4, 8: 8, 16: 12, 28: 12}  # of the batches that begin after so many samples
FULL = 12


def size_at(consumed: int) -> int:
    return 4 if consumed < 8 else 8 if consumed < 16 else FULL


def loader(folder: Path, dp: int, rank: int, *, prefetch: bool) -> BatchLoader:
    prefix = folder / "a"
    if not prefix.with_suffix(".idx").exists():
        with IndexedWriter(prefix, np.int32) as writer:
            writer.add_document(list(range(118)))
    dataset = TokenDataset([prefix], SEQ_LEN)
    return BatchLoader(
        dataset,
        SampleOrder(len(dataset), seed=5),
        global_batch_size=FULL,
        micro_batch_size=2,
        dp=dp,
        dp_rank=rank,
        prefetch=prefetch,
        batch_size_at=size_at,
    )


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("dp", [1, 2])
def test_the_order_of_samples_is_that_of_no_ramp(tmp_path: Path, dp: int, prefetch: bool) -> None:
    ranks = [loader(tmp_path, dp, rank, prefetch=prefetch) for rank in range(dp)]
    wanted = ranks[0].order.ids(0, 40)
    for consumed, size in SIZES.items():
        batches = [rank.batch(consumed) for rank in ranks]
        assert [len(batch) for batch in batches] == [size // (2 * dp)] * dp
        firsts = torch.cat([part.tokens[:, 0] for batch in batches for part in batch])
        assert (firsts // SEQ_LEN).tolist() == wanted[consumed : consumed + size].tolist()
    for rank in ranks:
        rank.close()


def test_what_is_read_ahead_is_the_next_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch is read once: the thread knows where the next one begins."""
    read: list[int] = []
    plain = BatchLoader._read

    def watched(self: BatchLoader, consumed: int) -> object:
        read.append(consumed)
        return plain(self, consumed)

    monkeypatch.setattr(BatchLoader, "_read", watched)
    one = loader(tmp_path, 1, 0, prefetch=True)
    for consumed in SIZES:
        one.batch(consumed)
    one.close()
    assert read[: len(SIZES)] == [*SIZES] and len(read) <= len(SIZES) + 1


def test_an_evaluation_takes_full_batches(tmp_path: Path) -> None:
    (first, second) = loader(tmp_path, 2, 0, prefetch=False).eval_batches(2)
    assert len(first) == len(second) == FULL // 4
