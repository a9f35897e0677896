from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megatron_lite.distributed import collectives
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.topology import AXES, Layout
from megatron_lite.distributed.worker_pool import WorkerPool

CPU = torch.device("cpu")
LAYOUTS = (Layout(pp=2, tp=2), Layout(dp=2, tp=2), Layout(pp=2, dp=2), Layout(pp=4), Layout(tp=4), Layout(cp=2, ep=2))


def describe_meshes() -> list[dict[str, Any]]:
    """For each layout: what every axis says, and which ranks its group really spans."""
    described = []
    for layout in LAYOUTS:
        mesh = build_mesh(layout, device=CPU)
        seen: dict[str, Any] = {"rank": mesh.rank}
        for name in (*AXES, "pp_return", "world"):
            axis = getattr(mesh, name)
            spanned = collectives.gather_objects(mesh.rank, axis)
            seen[name] = (axis.size, axis.index, list(axis.ranks), spanned, axis.is_first, axis.is_last)
        seen["separate"] = mesh.pp.size == 1 or mesh.pp.group is not mesh.pp_return.group
        described.append(seen)
    return described


def test_axes_and_the_groups_that_span_them(pool: WorkerPool) -> None:
    results = pool.run(describe_meshes, 4)
    for rank, described in enumerate(results):
        assert len(described) == len(LAYOUTS)
        for layout, seen in zip(LAYOUTS, described, strict=True):
            assert seen["rank"] == rank and seen["separate"]
            for name in (*AXES, "pp_return"):
                axis = name.removesuffix("_return")
                ranks, index = list(layout.ranks_along(rank, axis)), layout.index(rank, axis)
                size = layout.size(axis)
                assert seen[name] == (size, index, ranks, ranks, index == 0, index == size - 1), (layout, name)
            assert seen["world"] == (4, rank, [0, 1, 2, 3], [0, 1, 2, 3], rank == 0, rank == 3)


def build_too_large() -> str:
    with pytest.raises(ValueError) as caught:
        build_mesh(Layout(pp=2, tp=4), device=CPU)
    return str(caught.value)


def test_a_world_of_another_size_is_refused(pool: WorkerPool) -> None:
    for message in pool.run(build_too_large, 2):
        assert "tp4 pp2 needs 8 processes, and 2 were started" in message and "start 8" in message


def try_to_change() -> bool:
    mesh = build_mesh(Layout(), device=CPU)
    with pytest.raises(dataclasses.FrozenInstanceError):
        mesh.rank = 1  # type: ignore[misc]
    return True


def test_a_mesh_does_not_change(pool: WorkerPool) -> None:
    assert pool.run(try_to_change, 1) == [True]
