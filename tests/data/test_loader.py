"""What each rank reads: together always the same samples, whatever the layout."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_lite.data import (
    BatchLoader,
    DataError,
    IndexedWriter,
    Microbatch,
    SampleOrder,
    TokenDataset,
)
from megatron_lite.ops.cross_entropy_shard import IGNORED_TARGET

SEQ_LEN = 4
LAYOUTS = [(dp, micro) for dp in (1, 2, 3, 4) for micro in (1, 2, 3, 4) if 12 % (dp * micro) == 0]


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """29 samples of 4, tokens 0 .. 117, in documents of 10."""
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        for first in range(0, 118, 10):
            writer.add_document(list(range(first, min(first + 10, 118))))
    return tmp_path / "a"


def loaders(
    prefix: Path, dp: int, micro: int, *, shuffle: bool = True, isolate: bool = False, prefetch: bool = False
) -> list[BatchLoader]:
    dataset = TokenDataset([prefix], SEQ_LEN, isolate_documents=isolate)
    return [
        BatchLoader(
            dataset,
            SampleOrder(len(dataset), seed=5, shuffle=shuffle),
            global_batch_size=12,
            micro_batch_size=micro,
            dp=dp,
            dp_rank=rank,
            prefetch=prefetch,
        )
        for rank in range(dp)
    ]


def joined(batches: list[list[Microbatch]], name: str = "tokens") -> torch.Tensor:
    """[samples, S] of all ranks, in rank order."""
    return torch.cat([getattr(micro, name) for batch in batches for micro in batch])


@pytest.mark.parametrize(("dp", "micro"), LAYOUTS)
def test_every_layout_reads_the_same_batch(prefix: Path, dp: int, micro: int) -> None:
    one = loaders(prefix, 1, 12)
    ranks = loaders(prefix, dp, micro)
    for step in (0, 2, 3):  # 29 samples: steps 2 and beyond cross into the next epoch
        batches = [loader.batch(12 * step) for loader in ranks]
        assert all(len(batch) == 12 // (dp * micro) == ranks[0].num_microbatches for batch in batches)
        assert all(part.tokens.shape == part.targets.shape == (micro, SEQ_LEN) for batch in batches for part in batch)
        for name in ("tokens", "targets"):
            assert torch.equal(joined(batches, name), joined([one[0].batch(12 * step)], name))
        assert not torch.equal(joined(batches), joined([one[0].batch(12 * step + 12)]))  # negative control
        assert sum(int((part.targets != IGNORED_TARGET).sum()) for batch in batches for part in batch) == 48


def test_unshuffled_batches_are_the_text_in_order(prefix: Path) -> None:
    (loader,) = loaders(prefix, 1, 3, shuffle=False)
    for step in (0, 1):
        tokens = joined([loader.batch(12 * step)])
        assert tokens.flatten().tolist() == list(range(step * 48, step * 48 + 48))
        assert torch.equal(joined([loader.batch(12 * step)], "targets"), tokens + 1)


def test_tensors(prefix: Path) -> None:
    (plain,), (isolated,) = loaders(prefix, 1, 4), loaders(prefix, 1, 4, shuffle=False, isolate=True)
    part = plain.batch(0)[0]
    assert part.documents is None and part.positions is None
    part = isolated.batch(0)[0]
    assert part.documents is not None and part.positions is not None
    for tensor, dtype in (
        (part.tokens, torch.int64),
        (part.targets, torch.int64),
        (part.documents, torch.int32),
        (part.positions, torch.int64),
    ):
        assert tensor.dtype == dtype and tensor.shape == (4, SEQ_LEN) and tensor.is_contiguous()
    assert part.documents[2].tolist() == [0, 0, 1, 1]  # tokens 8, 9 | 10, 11
    assert part.positions[2].tolist() == [0, 1, 0, 1]


def test_an_epoch_reads_every_sample_once(prefix: Path) -> None:
    (loader,) = loaders(prefix, 1, 12)
    firsts = torch.cat([joined([loader.batch(12 * step)])[:, 0] for step in range(3)]).tolist()
    assert sorted(firsts[:29]) == [SEQ_LEN * sample for sample in range(29)]
    assert firsts[:29] != sorted(firsts[:29])


@pytest.mark.parametrize(("dp", "micro"), LAYOUTS)
def test_evaluation_reads_each_sample_once_in_order(prefix: Path, dp: int, micro: int) -> None:
    ranks = loaders(prefix, dp, micro)
    evaluations = [list(loader.eval_batches(100)) for loader in ranks]
    assert [len(evaluation) for evaluation in evaluations] == [3] * dp  # 12 + 12 + 5 samples
    assert ranks[0].num_eval_batches(100) == 3
    seen = []
    for number in range(3):
        batches = [evaluation[number] for evaluation in evaluations]
        assert {len(batch) for batch in batches} == {ranks[0].num_microbatches}
        tokens, targets = joined(batches), joined(batches, "targets")
        real = targets[:, 0] != IGNORED_TARGET
        assert torch.equal(targets[real], tokens[real] + 1)
        assert (targets[~real] == IGNORED_TARGET).all()
        assert int((targets != IGNORED_TARGET).sum()) == [48, 48, 20][number]
        seen += tokens[real].flatten().tolist()
    assert seen == list(range(29 * SEQ_LEN))


@pytest.mark.parametrize("micro", [1, 4])
def test_a_filler_has_no_targets_and_the_tokens_of_the_last_sample(prefix: Path, micro: int) -> None:
    """A microbatch of one sample is contiguous, so that its tokens and targets could share their memory."""
    (loader,) = loaders(prefix, 1, micro)
    (last,) = list(loader.eval_batches(100))[2:]
    tokens, targets = joined([last]), joined([last], "targets")
    assert (targets[5:] == IGNORED_TARGET).all() and (targets[:5] != IGNORED_TARGET).all()
    assert tokens.tolist() == [list(range(4 * i, 4 * i + 4)) for i in (24, 25, 26, 27, *[28] * 8)]


def test_evaluation_stops_where_it_is_told(prefix: Path) -> None:
    (loader,) = loaders(prefix, 1, 12)
    batches = list(loader.eval_batches(2))
    assert len(batches) == 2
    assert joined(batches).flatten().tolist() == list(range(96))  # in the order of the file, though training shuffles
    assert list(loader.eval_batches(0)) == []


def test_prefetching_changes_nothing(prefix: Path) -> None:
    (plain,), (ahead,) = loaders(prefix, 1, 4), loaders(prefix, 1, 4, prefetch=True)
    for step in (0, 1, 2, 7, 7, 3):  # in order, a jump, a repetition, a step back
        assert torch.equal(joined([ahead.batch(12 * step)]), joined([plain.batch(12 * step)]))
    ahead.close()
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())
    assert torch.equal(joined([ahead.batch(12)]), joined([plain.batch(12)]))  # closed, it still reads


def test_an_error_in_the_prefetching_thread_is_raised_at_its_step(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", np.int32) as writer:
        writer.add_document([*range(SEQ_LEN * 2 + 1), 99, *range(SEQ_LEN)])
    dataset = TokenDataset([tmp_path / "a"], SEQ_LEN, vocab_size=50)
    order = SampleOrder(len(dataset), seed=0, shuffle=False)
    loader = BatchLoader(dataset, order, global_batch_size=1, micro_batch_size=1, prefetch=True)
    loader.batch(0)
    loader.batch(1)  # step 2 is being read, and fails, meanwhile
    with pytest.raises(DataError, match="id 99"):
        loader.batch(2)
    assert torch.equal(loader.batch(0)[0].tokens[0], torch.arange(SEQ_LEN))  # and it goes on
    loader.close()


def test_a_batch_that_does_not_divide_is_refused_at_once(prefix: Path) -> None:
    with pytest.raises(ValueError, match="global_batch_size 12"):
        loaders(prefix, 5, 1)
