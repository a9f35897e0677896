"""Axes and meshes of a single process, for what communicates only where there is someone to talk to."""

from __future__ import annotations

import torch

from megatron_lite.distributed.mesh import Axis, Mesh
from megatron_lite.distributed.topology import AXES, Layout


def axis(name: str, size: int = 1, index: int = 0) -> Axis:
    """An axis without a group: enough for local shapes, and to communicate if its size is 1."""
    return Axis(name, size, index, range(size), None)


def mesh(**indices: tuple[int, int]) -> Mesh:
    """A mesh without groups; ``dp=(2, 1)`` is index 1 of a data-parallel axis of size 2."""
    axes = {name: axis(name, *indices.get(name, (1, 0))) for name in AXES}
    layout = Layout(**{name: one.size for name, one in axes.items()})
    rank = layout.rank(**{name: one.index for name, one in axes.items()})
    world = axis("world", layout.world_size, rank)
    groups = {"shard": axes["dp"], "replica": axis("replica")}
    return Mesh(layout, rank, torch.device("cpu"), pp_return=axes["pp"], world=world, **groups, **axes)
