"""The same samples step by step for every layout, and over a resume that changes the layout: ids and tokens."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from megatron_lite.data import (
    BatchLoader,
    BlendedDataset,
    BlendedOrder,
    IndexedWriter,
    SampleOrder,
    TokenDataset,
    index,
    index_reference,
)
from megatron_lite.data.dataset import Samples
from megatron_lite.data.order import Order

SEQ_LEN, GLOBAL_BATCH, SEED = 4, 16, 5
WEIGHTS = (0.6, 0.3, 0.1)
LAYOUTS = [(dp, micro) for dp in (1, 2, 4) for micro in (1, 2, 4)]


@pytest.fixture(scope="module", params=["one source", "blend"])
def samples(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Samples, Order]:
    """Samples whose tokens tell which they are, in documents that end inside them."""
    folder = tmp_path_factory.mktemp("corpus")
    sizes = (83, 41, 11) if request.param == "blend" else (135,)
    sources = []
    for number, size in enumerate(sizes):
        with IndexedWriter(folder / f"s{number}", np.uint16) as writer:
            tokens = np.arange(size * SEQ_LEN + 1) + 1000 * number
            for part in np.array_split(tokens, size // 3):
                writer.add_document(part)
        sources.append(TokenDataset([folder / f"s{number}"], SEQ_LEN, isolate_documents=True))
    orders = [SampleOrder(len(source), SEED, source=number) for number, source in enumerate(sources)]
    if request.param == "blend":
        return BlendedDataset(sources), BlendedOrder(orders, WEIGHTS)
    return sources[0], orders[0]


def ranks(samples: tuple[Samples, Order], dp: int, micro: int, batch: int = GLOBAL_BATCH) -> list[BatchLoader]:
    return [
        BatchLoader(*samples, global_batch_size=batch, micro_batch_size=micro, dp=dp, dp_rank=rank)
        for rank in range(dp)
    ]


def read(loaders: list[BatchLoader], consumed: int) -> tuple[list[int], torch.Tensor]:
    """What all ranks read of one global batch: ids, and tokens, targets, documents and positions, [4, samples, S]."""
    ids = [int(one) for loader in loaders for one in loader.sample_ids(consumed).flat]
    parts = [part for loader in loaders for part in loader.batch(consumed)]
    fields = [torch.cat([getattr(part, name) for part in parts]) for name in ("tokens", "targets")]
    fields += [torch.cat([getattr(part, name).long() for part in parts]) for name in ("documents", "positions")]
    return ids, torch.stack(fields)


@pytest.mark.parametrize(("dp", "micro"), LAYOUTS)
def test_every_layout_reads_the_same_samples(samples: tuple[Samples, Order], dp: int, micro: int) -> None:
    one, many = ranks(samples, 1, GLOBAL_BATCH), ranks(samples, dp, micro)
    for step in range(20):  # 320 samples: more than two epochs
        ids, tensors = read(one, step * GLOBAL_BATCH)
        other_ids, other_tensors = read(many, step * GLOBAL_BATCH)
        assert other_ids == ids == samples[1].ids(step * GLOBAL_BATCH, GLOBAL_BATCH).tolist()
        assert torch.equal(other_tensors, tensors)
        # Negative control: what is compared changes from step to step.
        assert read(one, (step + 1) * GLOBAL_BATCH)[0] != ids


def resumed(
    samples: tuple[Samples, Order], legs: list[tuple[int, int, int, int]]
) -> Iterator[tuple[int, torch.Tensor]]:
    """(sample id, its tensors) in the order of the global batches; a leg is (steps, dp, micro, global batch)."""
    consumed = 0
    for steps, dp, micro, batch in legs:
        loaders = ranks(samples, dp, micro, batch)  # a new process knows only how many samples were consumed
        for _ in range(steps):
            ids, tensors = read(loaders, consumed)
            yield from zip(ids, tensors.unbind(1), strict=True)
            consumed += batch


@pytest.mark.parametrize(
    "legs",
    [
        [(3, 2, 4, 16), (5, 4, 1, 16), (4, 1, 2, 16)],
        [(3, 1, 4, 16), (6, 2, 2, 8), (3, 4, 2, 32), (1, 1, 1, 1), (2, 4, 4, 16)],
    ],
)
def test_a_resume_goes_on_with_the_very_next_sample(
    samples: tuple[Samples, Order], legs: list[tuple[int, int, int, int]]
) -> None:
    total = sum(steps * batch for steps, _, _, batch in legs)
    straight = list(resumed(samples, [(total, 1, 1, 1)]))
    moved = list(resumed(samples, legs))
    assert len(moved) == total > 135
    assert [one for one, _ in moved] == [one for one, _ in straight]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(moved, straight, strict=True))
    # Negative control: a resume that counts steps and not samples repeats or leaves out some when the batch changes.
    by_steps = [samples[1].ids(step * batch, batch) for step, batch in ((3, 16), (3, 8))]
    assert by_steps[0][:8].tolist() != by_steps[1].tolist()


def test_tokens_tell_the_sample(samples: tuple[Samples, Order]) -> None:
    """The ids that are compared above are those of the tokens that are read."""
    dataset, _ = samples
    first_ids = dataset.first_ids if isinstance(dataset, BlendedDataset) else np.array([0, len(dataset)])
    (loader,) = ranks(samples, 1, 1)
    for part, one in zip(loader.batch(48), loader.sample_ids(48).flat, strict=True):
        source = int(np.searchsorted(first_ids, one, side="right")) - 1
        assert part.tokens[0, 0] == 1000 * source + SEQ_LEN * (one - first_ids[source])


def test_numpy_reads_what_the_compiled_index_reads(
    samples: tuple[Samples, Order], monkeypatch: pytest.MonkeyPatch
) -> None:
    (loader,) = ranks(samples, 1, 4)
    native = [read([loader], consumed) for consumed in range(0, 320, GLOBAL_BATCH)]
    monkeypatch.setattr(index, "implementation", lambda: index_reference)
    (fresh,) = ranks((samples[0], again(samples[1], SEED)), 1, 4)
    for step, (ids, tensors) in enumerate(native):
        other_ids, other_tensors = read([fresh], step * GLOBAL_BATCH)
        assert other_ids == ids and torch.equal(other_tensors, tensors)


def again(order: Order, seed: int) -> Order:
    """The same kind of order, made anew."""
    if isinstance(order, BlendedOrder):
        return BlendedOrder([SampleOrder(one.num_samples, seed, source=one.source) for one in order.orders], WEIGHTS)
    return SampleOrder(order.num_samples, seed)


def test_another_seed_is_another_order(samples: tuple[Samples, Order]) -> None:
    _, order = samples
    assert again(order, SEED + 1).ids(0, 32).tolist() != order.ids(0, 32).tolist()
    assert again(order, SEED).ids(0, 32).tolist() == order.ids(0, 32).tolist()


def test_prefetching_goes_on_where_the_batch_ends(samples: tuple[Samples, Order]) -> None:
    loader = BatchLoader(*samples, global_batch_size=16, micro_batch_size=4, prefetch=True)
    (plain,) = ranks(samples, 1, 4)
    for consumed in (0, 16, 32, 7, 23, 100, 100, 84):  # in order, and jumps
        assert torch.equal(read([loader], consumed)[1], read([plain], consumed)[1])
    loader.close()
