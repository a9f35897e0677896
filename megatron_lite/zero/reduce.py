"""Sums the gradients of buckets over ranks, while backward goes on.

A bucket's sum begins when its last gradient is there: first over tp, where a parameter's identity says that it is a
partial sum; then over the ranks that share slices (exchange slice by slice, added in rank order, so that no algorithm
of a library decides about a bit); then over the groups that hold the same slices. What travels is out of the way of the
computing; the additions are made when the next buckets begin, and at the end.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from torch import Tensor

from megatron_lite.distributed import collectives
from megatron_lite.distributed.mesh import Mesh
from megatron_lite.zero.bucket import Bucket
from megatron_lite.zero.offload import loaded

# Sums under way: each holds the gradients that leave and as much memory for those that come.
MOST_UNDER_WAY = 2


@dataclass
class Traffic:
    """Payloads of this rank's collectives over dp, bytes: each counts the whole bucket that it makes or sums."""

    gathered_bytes: int = 0
    reduced_bytes: int = 0


class Reduction:
    """The sums of one rank."""

    def __init__(self, mesh: Mesh, traffic: Traffic) -> None:
        self._mesh, self._traffic = mesh, traffic
        self._under_way: deque[tuple[Bucket, collectives.Pending]] = deque()
        self._has_sums: set[str] = set()  # buckets with the sum of a microbatch of this step

    def reset(self) -> None:
        """A step begins. What a step that broke off had under way is waited for."""
        while self._under_way:
            self._under_way.popleft()[1].wait()
        self._has_sums.clear()

    def start(self, bucket: Bucket, key: int) -> None:
        """Begins to sum what `Gradients` has for ``key``. Every rank starts the same buckets in the same order."""
        gradients = bucket.gradients.take(key)
        self._sum_over_tp(bucket, gradients)
        self.sum_over_dp(bucket, gradients)

    def sum_over_dp(self, bucket: Bucket, gradients: Tensor) -> None:
        """Begins the sum of whole gradients ``[size]`` over dp, of which this rank gets its slice."""
        while len(self._under_way) >= MOST_UNDER_WAY:
            self._finish_one()
        if self._mesh.dp.size > 1:
            self._traffic.reduced_bytes += gradients.nbytes
        self._under_way.append((bucket, collectives.start_reduce_scatter(gradients, self._mesh.shard)))

    def finish(self, buckets: list[Bucket]) -> None:
        """Waits for all sums; each bucket's region is then complete, but for ties."""
        while self._under_way:
            self._finish_one()
        for bucket in buckets:
            if bucket.layout.name not in self._has_sums:
                with loaded(bucket.stored["sums"], reads=False, writes=True) as sums:
                    sums.zero_()
            elif bucket.region.size > bucket.slice.size:
                # Gloo and NCCL want the slice apart from what they write.
                collectives.all_gather(bucket.slice_sums().clone(), self._mesh.shard, out=bucket.sums)

    def _finish_one(self) -> None:
        bucket, pending = self._under_way.popleft()
        total = pending.wait()
        if self._mesh.replica.size > 1:
            own = collectives.reduce_scatter(total, self._mesh.replica)
            total = collectives.all_gather(own, self._mesh.replica)
        self.add(bucket, total)

    def add(self, bucket: Bucket, total: Tensor) -> None:
        """Adds a slice of summed gradients to what the step has of it."""
        own = bucket.slice.shift(-bucket.region.start)
        has_sums = bucket.layout.name in self._has_sums
        with loaded(bucket.stored["sums"], reads=has_sums, writes=True) as region:
            sums = region[own.start : own.stop]
            if has_sums:
                sums.add_(total.to(sums.device))
            elif sums.data_ptr() != total.data_ptr():
                sums.copy_(total)
        self._has_sums.add(bucket.layout.name)

    def _sum_over_tp(self, bucket: Bucket, gradients: Tensor) -> None:
        if not bucket.partial_sums:
            return
        buffer = gradients.new_zeros(bucket.partial_buffer_size)
        for part in bucket.partial_sums:
            buffer[part.place.start : part.place.stop] = gradients[part.local.start : part.local.stop]
        collectives.all_reduce(buffer, self._mesh.tp)
        for part in bucket.partial_sums:
            gradients[part.local.start : part.local.stop] = buffer[part.place.start : part.place.stop]
