"""The checkpoint benchmark runs, and what it moves is what it says."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.checkpoint import KINDS, WHAT, State, measure
from megatron_lite.checkpoint.chunks import Box, tiling_problem
from megatron_lite.distributed.mesh import Axis
from megatron_lite.distributed.worker_pool import WorkerPool
from tests.checkpoint.pure import tiny_model


def test_the_slices_are_the_whole_state() -> None:
    states = [State(Axis("world", 3, index, range(3), None), megabytes=2, num_tensors=7) for index in range(3)]
    for tensors in zip(*(state.tensors for state in states), strict=True):
        boxes = [Box(chunk.offsets, chunk.sizes) for tensor in tensors for chunk in tensor.chunks]
        assert tiling_problem(tensors[0].shape, boxes) is None
    assert len(states[0].tensors) == 7 * len(KINDS)
    size = sum(chunk.values.nbytes for state in states for tensor in state.tensors for chunk in tensor.chunks)
    assert 1.8e6 < size < 2.1e6
    assert all(tensor.dtype == torch.float32 for tensor in states[0].tensors)


def test_it_runs(pool: WorkerPool, tmp_path: Path) -> None:
    for seconds in pool.run(measure, 2, tmp_path, tiny_model(), 2, 3, 2):
        assert list(seconds) == list(WHAT) and all(len(values) == 2 for values in seconds.values())
        assert all(value > 0 for values in seconds.values() for value in values)
    files = [path.name for path in (tmp_path / "checkpoints" / "step-00000001").iterdir()]
    assert sorted(files) == ["checkpoint.json", "rank-00000.safetensors", "rank-00001.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"], "the copies are gone"
