"""The mesh: who this process is, and the process group of each axis."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatron_lite.distributed.topology import AXES, Layout


@dataclass(frozen=True)
class Axis:
    """One mesh axis as this rank sees it: its size, this rank's index on it, and the group that spans it."""

    name: str
    size: int
    index: int
    ranks: range
    group: ProcessGroup | None

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.size - 1


@dataclass(frozen=True)
class Mesh:
    """All axes of a layout, passed by keyword to whatever communicates.

    ``world`` spans every rank. ``pp_return`` has the ranks of ``pp``, and carries gradients back while ``pp`` carries
    activations forward: on NCCL the operations of a group run in the order in which they were started, and a gradient
    need not queue behind an activation. ``shard`` has the neighbours on ``dp`` among which ZeRO slices, and ``replica``
    the ranks of other such groups that hold the same slice; a rank is at ``replica.index * shard.size + shard.index``
    of ``dp``.
    """

    layout: Layout
    rank: int
    device: torch.device
    pp: Axis
    dp: Axis
    cp: Axis
    ep: Axis
    tp: Axis
    pp_return: Axis
    world: Axis
    shard: Axis
    replica: Axis
    timeout_s: float | None = None


def build_mesh(
    layout: Layout, *, device: torch.device, timeout_s: float | None = None, zero_group: int | None = None
) -> Mesh:
    """Builds the mesh of ``layout`` over the default process group, which must have ``layout.world_size`` ranks.

    timeout_s: longest wait in a group that is made here; None: torch's. The others have that of the default group.
    zero_group: size of ``shard``; None: that of ``dp``.

    Raises ValueError if the world has another size, or ``zero_group`` does not divide dp.
    """
    world_size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    if world_size != layout.world_size:
        raise ValueError(
            f"the layout {layout} needs {layout.world_size} processes, and {world_size} were started: "
            f"start {layout.world_size}, or change parallel.tp, parallel.pp or parallel.dp"
        )
    device_mesh: DeviceMesh = init_device_mesh(
        device.type, tuple(layout.size(axis) for axis in AXES), mesh_dim_names=AXES
    )

    def along(name: str, group: ProcessGroup | None) -> Axis:
        return Axis(name, layout.size(name), layout.index(rank, name), layout.ranks_along(rank, name), group)

    axes = {name: along(name, device_mesh.get_group(name)) for name in AXES}
    pp_return = along("pp", _second_group_of(layout, rank, "pp", timeout_s))
    world = Axis("world", world_size, rank, range(world_size), torch.distributed.group.WORLD)
    shard, replica = _split_dp(layout, rank, axes["dp"], zero_group or layout.dp, timeout_s)
    return Mesh(
        layout,
        rank,
        device,
        pp_return=pp_return,
        world=world,
        shard=shard,
        replica=replica,
        timeout_s=timeout_s,
        **axes,
    )


def second_world(mesh: Mesh) -> Axis:
    """All ranks once more, in a group on gloo that nothing else uses: for a thread that talks while the steps do.

    Every rank calls it, at the same place among the groups that it makes.
    """
    alone = mesh.world.size == 1
    group = None if alone else _new_group(mesh.world.ranks, mesh.timeout_s, backend="gloo")
    return dataclasses.replace(mesh.world, group=group)


def _second_group_of(layout: Layout, rank: int, axis: str, timeout_s: float | None) -> ProcessGroup | None:
    """Another process group over the same ranks as ``axis``."""
    if layout.size(axis) == 1:
        return None
    firsts = (r for r in range(layout.world_size) if layout.index(r, axis) == 0)
    return _own_group(rank, [layout.ranks_along(first, axis) for first in firsts], timeout_s)


def _split_dp(layout: Layout, rank: int, dp: Axis, size: int, timeout_s: float | None) -> tuple[Axis, Axis]:
    """``dp`` as groups of ``size`` neighbours, and across these groups."""
    if dp.size % size:
        raise ValueError(f"a group of {size} ranks does not divide dp = {dp.size}: change parallel.zero_group")
    if size == dp.size:
        return dataclasses.replace(dp, name="shard"), Axis("replica", 1, 0, range(rank, rank + 1), None)
    along = [layout.ranks_along(r, "dp") for r in range(layout.world_size) if layout.index(r, "dp") == 0]
    shards = [ranks[first : first + size] for ranks in along for first in range(0, dp.size, size)]
    replicas = [ranks[first::size] for ranks in along for first in range(size)]

    def axis(name: str, groups: list[range]) -> Axis:
        ranks = next(ranks for ranks in groups if rank in ranks)
        group = _own_group(rank, groups, timeout_s) if len(ranks) > 1 else None
        return Axis(name, len(ranks), ranks.index(rank), ranks, group)

    return axis("shard", shards), axis("replica", replicas)


def _own_group(rank: int, groups: list[range], timeout_s: float | None) -> ProcessGroup | None:
    """The one of the groups that this rank is in. All ranks must make all groups, in the same order."""
    own = None
    for ranks in groups:
        group = _new_group(ranks, timeout_s)
        if rank in ranks:
            own = group
    return own


def _new_group(ranks: range, timeout_s: float | None, backend: str | None = None) -> ProcessGroup:
    """A group does not take the timeout of the default group by itself."""
    timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
    group: ProcessGroup = torch.distributed.new_group(list(ranks), timeout=timeout, backend=backend)
    return group
