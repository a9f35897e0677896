"""Whole parameters at ZeRO stage 3: collected from all ranks' slices ahead of their use, and freed after it.

The flat memory of a bucket, of which the model's parameters are views, has a storage that is made and freed. What
autograd has saved of it for a backward finds its values again when the bucket is whole again.

The first run of a schedule takes down in which order buckets are used. From then on, while one is used, the next one is
being collected. Every rank of a group uses the same buckets in the same order, so all start the same collectives.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.distributed import collectives
from megatron_lite.distributed.mesh import Axis
from megatron_lite.zero.bucket import Bucket
from megatron_lite.zero.offload import NOTHING, Pending
from megatron_lite.zero.reduce import Traffic

_LOOK_AHEAD = 4  # uses, in which two other buckets than the one in use are as a rule


@dataclass
class _Held:
    """A bucket that is whole, or becomes so. version: of the slices that it was collected from."""

    pending: collectives.Pending
    version: int
    is_whole: bool = False


class Gathering:
    """Which buckets of one rank are whole.

    Between ``open(chunk, keep=True)`` and ``close`` a bucket of the chunk stays whole from its first use; otherwise
    from just before each use until it is done.
    """

    def __init__(self, axis: Axis, traffic: Traffic) -> None:
        self._axis, self._traffic = axis, traffic
        self._held: dict[str, _Held] = {}
        self._buckets: dict[int, list[Bucket]] = {}  # of each chunk
        self._kept: set[int] = set()  # chunks whose buckets stay whole
        self._orders: dict[Hashable, list[Bucket]] = {}  # of the uses in a run, by what was run
        self._run: Hashable = None
        self._uses: list[Bucket] = []
        self._reading: dict[str, tuple[Tensor, Pending]] = {}  # slices on their way from where they are offloaded
        self._is_known = False  # whether the uses so far are those of the order that was taken down
        self._version = 0

    def add(self, chunk: int, buckets: Iterable[Bucket]) -> None:
        """Buckets of a chunk, of which nothing is whole yet."""
        self._buckets[chunk] = [bucket.owner for bucket in buckets]

    def forget(self) -> None:
        """The slices have changed: what is whole is so no longer."""
        for buckets in self._buckets.values():
            for bucket in buckets:
                self._release(bucket)
        for _, reading in self._reading.values():
            reading.wait()
        self._reading.clear()
        self._version += 1

    def begin(self, run: Hashable) -> None:
        """A run of a schedule begins; those with an equal ``run`` use the same buckets in the same order."""
        self._run, self._uses, self._is_known = run, [], run in self._orders

    def end(self, *, takes_down: bool = True) -> None:
        """The run is over: nothing is whole any longer. takes_down: False where it broke off."""
        if takes_down and not self._is_known:
            self._orders[self._run] = self._uses
        self._run, self._uses, self._is_known = None, [], False
        self._kept.clear()
        for buckets in self._buckets.values():
            for bucket in buckets:
                self._release(bucket)

    def open(self, chunk: int, *, keep: bool) -> None:
        """A chunk is about to be used."""
        if keep:
            self._kept.add(chunk)
        self._start_next()

    def close(self, chunk: int) -> None:
        """The chunk is not used any longer, or, if it was kept, not in this run."""
        self._kept.discard(chunk)
        for bucket in self._buckets[chunk]:
            held = self._held.get(bucket.layout.name)
            if held is not None and held.is_whole:
                self.done(bucket)

    def use(self, bucket: Bucket) -> None:
        """Returns when the bucket is whole."""
        owner = bucket.owner
        self._start(owner)
        held = self._held[owner.layout.name]
        if not held.is_whole:
            held.pending.wait()
            held.is_whole = True
        assert held.version == self._version, f"{owner.layout.name} is whole from slices that have changed since"
        following = self._following()
        self._is_known = bool(following) and following[0] is owner
        self._uses.append(owner)
        self._start_next()

    def done(self, bucket: Bucket) -> None:
        """A use is over: the memory is freed, unless the next use is of the same bucket."""
        owner = bucket.owner
        following = self._following()
        if following and following[0] is owner:
            return
        if any(owner in self._buckets[chunk] for chunk in self._kept):
            return
        self._release(owner)

    def _following(self) -> list[Bucket]:
        """What is used next, where it is known."""
        place = len(self._uses)
        return self._orders[self._run][place : place + _LOOK_AHEAD] if self._is_known else []

    def _start_next(self) -> None:
        """Starts to collect the bucket that is used after the one in use, and to read the one after that."""
        in_use = self._uses[-1] if self._uses else None
        ahead = [bucket for bucket in dict.fromkeys(self._following()) if bucket is not in_use]
        for bucket in ahead[:1]:
            self._start(bucket)
        for bucket in ahead[1:2]:
            if bucket.layout.name not in self._held:
                self._read(bucket)

    def _start(self, owner: Bucket) -> None:
        if owner.layout.name in self._held:
            return
        storage = owner.flat.untyped_storage()
        storage.resize_(owner.layout.size * owner.flat.element_size())
        if self._axis.size > 1:
            self._traffic.gathered_bytes += owner.flat.nbytes
        values, reading = self._read(owner)
        reading.wait()
        self._reading.pop(owner.layout.name, None)
        self._held[owner.layout.name] = _Held(self.collect(owner, values), self._version)

    def _read(self, owner: Bucket) -> tuple[Tensor, Pending]:
        """The slice, on the device: where it is, or begun to be read from where it is offloaded."""
        stored, name = owner.stored["values"], owner.layout.name
        if stored.in_place is not None:
            return stored.in_place, NOTHING
        if name not in self._reading:
            values = torch.empty(stored.numel, dtype=stored.dtype, device=owner.flat.device)
            self._reading[name] = values, stored.read(values)
        return self._reading[name]

    @torch.no_grad()
    def collect(self, owner: Bucket, values: Tensor) -> collectives.Pending:
        """Starts to fill a bucket's flat memory with the slices of all ranks, of which this one gives ``values``."""
        return collectives.start_all_gather(values, self._axis, out=owner.flat)

    def _release(self, owner: Bucket) -> None:
        held = self._held.pop(owner.layout.name, None)
        if held is not None:
            if not held.is_whole:
                held.pending.wait()
            owner.flat.untyped_storage().resize_(0)
