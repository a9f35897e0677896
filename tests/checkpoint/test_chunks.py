"""The geometry: whatever the layout, the chunks of all ranks are every global tensor, each element once."""

from __future__ import annotations

import math
import random

import pytest
import torch

from megatron_lite.checkpoint.chunks import Box, chunks_of, flat_boxes, tiling_problem
from tests.checkpoint.pure import SPECS, Memory, PureLayout, global_value, random_layout


@pytest.mark.parametrize("seed", range(40))
def test_the_chunks_of_all_ranks_are_the_whole(seed: int) -> None:
    rng = random.Random(seed)
    layout = random_layout(rng, largest=48)
    wholes = {f"weights/{spec.name}": torch.full(spec.shape, math.nan) for spec in SPECS}
    boxes: dict[str, list[Box]] = {name: [] for name in wholes}
    for rank in range(layout.world_size):
        memory = Memory(layout, rank)
        for tensor in memory.to_save(memory.filled(seed)):
            for chunk in tensor.chunks:
                box = Box(chunk.offsets, chunk.sizes)
                boxes[tensor.name].append(box)
                where = tuple(slice(offset, end) for offset, end in zip(box.offsets, box.ends, strict=True))
                wholes[tensor.name][where] = chunk.values
    for spec in SPECS:
        name = f"weights/{spec.name}"
        assert tiling_problem(spec.shape, boxes[name]) is None, layout
        assert torch.equal(wholes[name], global_value(spec, seed).float()), layout
        assert tiling_problem(spec.shape, boxes[name][1:]) is not None, "negative control: a chunk is missing"
        assert tiling_problem(spec.shape, [*boxes[name], boxes[name][0]]) is not None, "negative control: one is twice"


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_chunks_are_views_of_every_element_that_is_no_padding(tp: int) -> None:
    for spec in SPECS:
        for index in range(tp):
            shard = spec.shard(tp, index)
            flat = torch.zeros(math.prod(shard.shape))
            for chunk in chunks_of(spec, tp, index, flat, 0):
                chunk.values.add_(1)
            held = sum(piece.size for piece in shard.pieces) * math.prod(spec.shape) // spec.shape[spec.shard_dim or 0]
            assert flat.max() == 1 and flat.sum() == held, spec.name
            assert spec.is_vocabulary or flat.min() == 1, spec.name


def test_replicas_are_loaded_by_all_and_saved_by_one() -> None:
    qkv = next(spec for spec in SPECS if spec.name == "qkv")
    flat = torch.zeros(math.prod(qkv.shard(4, 1).shape))
    assert len(chunks_of(qkv, 4, 1, flat, 0)) == 3
    assert len(chunks_of(qkv, 4, 1, flat, 0, owned_only=True)) == 1, "rank 0 of 4 has the same kv heads"
    assert len(chunks_of(qkv, 4, 2, flat, 0, owned_only=True)) == 3


def test_a_slice_of_a_matrix_is_at_most_three_boxes() -> None:
    boxes = [box for _, box in flat_boxes((10, 8), 13, 61)]
    assert boxes == [Box((1, 5), (1, 3)), Box((2, 0), (5, 8)), Box((7, 0), (1, 5))]
    assert [box for _, box in flat_boxes((10, 8), 8, 24)] == [Box((1, 0), (2, 8))]
    assert [box for _, box in flat_boxes((10, 8), 9, 12)] == [Box((1, 1), (1, 3))]
    assert list(flat_boxes((10, 8), 9, 9)) == []


@pytest.mark.parametrize("seed", range(100))
def test_flat_boxes_are_the_interval_in_order(seed: int) -> None:
    rng = random.Random(seed)
    shape = tuple(rng.randint(1, 5) for _ in range(rng.randint(0, 4)))
    start = rng.randint(0, math.prod(shape))
    stop = rng.randint(start, math.prod(shape))
    numbers = torch.arange(math.prod(shape)).view(shape)
    found = []
    for at, box in flat_boxes(shape, start, stop):
        values = numbers[tuple(slice(offset, end) for offset, end in zip(box.offsets, box.ends, strict=True))]
        assert values.is_contiguous() and values.reshape(-1)[0] == at
        found += values.reshape(-1).tolist()
    assert found == list(range(start, stop))


@pytest.mark.parametrize(
    ("boxes", "problem"),
    [
        ([Box((0, 0), (2, 4)), Box((2, 0), (1, 4))], None),
        ([Box((0, 0), (3, 1)), Box((0, 1), (3, 3))], None),
        ([Box((0, 0), (2, 4)), Box((1, 0), (2, 4))], "overlap"),
        ([Box((0, 0), (2, 4)), Box((1, 3), (1, 1))], "overlap"),
        ([Box((0, 0), (2, 4))], "8 of its 12"),
        ([Box((0, 0), (4, 4))], "outside"),
        ([Box((0, -1), (3, 5))], "not of a tensor"),
        ([Box((0,), (12,))], "not of a tensor"),
        ([Box((0, 0), (2, 4)), Box((0, 0), (1, 4))], "overlap"),
    ],
)
def test_tiling(boxes: list[Box], problem: str | None) -> None:
    found = tiling_problem((3, 4), boxes)
    assert found is None if problem is None else found is not None and problem in found


def test_tiling_of_a_scalar_and_of_nothing() -> None:
    assert tiling_problem((), [Box((), ())]) is None
    assert tiling_problem((), [Box((), ()), Box((), ())]) is not None
    assert tiling_problem((), []) is not None
    assert tiling_problem((0, 4), []) is None


def test_a_layout_with_everything() -> None:
    """The property test would pass on layouts that slice nothing: this one has partial rows, padding and replicas."""
    layout = PureLayout(tp=4, dp=3, pp=1)
    memories = [Memory(layout, rank) for rank in range(layout.world_size)]
    chunks = [chunk for m in memories for tensor in m.to_save(m.filled(1)) for chunk in tensor.chunks]
    assert any(chunk.values.ndim == 2 and chunk.sizes[0] == 1 < chunk.sizes[1] < 12 for chunk in chunks)
    assert sum(chunk.values.numel() for chunk in chunks) == sum(spec.numel for spec in SPECS)
    held = sum(m.size for m in memories)
    assert held > sum(chunk.values.numel() for chunk in chunks)
