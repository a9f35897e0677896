"""ZeRO on flat buckets (Rajbhandari et al. 2020): one mechanism; the stage says what is whole and what is a slice.

A step: microbatches add into each bucket's gradients; ``reduce_gradients`` sums them over tp (where a parameter's
identity says that they are partial), over dp, and over the two uses of a tied table; the optimizer updates this rank's
region of the master weights and of the parameters; ``gather_parameters`` makes these whole again. Data-parallel
contributions are exchanged slice by slice and added in rank order, by the same partition at every stage, so the stages
agree in every bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from megatron_lite.distributed import collectives
from megatron_lite.distributed.mesh import Mesh
from megatron_lite.models.identity import ParameterTable
from megatron_lite.zero.bucket import Bucket
from megatron_lite.zero.partition import Interval, lay_out, unit_of


class ZeroEngine:
    """Owns the memory of a model's parameters and gradients on this rank.

    Args:
        parameters: this rank's parameters by global name, on ``mesh.device``, with their values.
        stage: 0 keeps the optimizer's state whole on every data-parallel rank, 1 a slice of it.
        stages_of: pipeline stage that holds each parameter of a tied pair, by name.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        table: ParameterTable,
        *,
        mesh: Mesh,
        stage: int,
        param_dtype: torch.dtype,
        grad_dtype: torch.dtype,
        sequence_parallel: bool,
        stages_of: dict[str, int],
    ) -> None:
        self.mesh, self.stage = mesh, stage
        self.tied_pairs = table.tied_pairs()
        self._stages_of = stages_of
        tied = [name for pair in self.tied_pairs for name in pair]
        owner_of = {follower: owner for owner, follower in self.tied_pairs}
        units: dict[str, list[str]] = {}
        for name in parameters:
            units.setdefault(unit_of(name, tied), []).append(name)
        specs = {spec.name: spec for spec in table}
        self.buckets: dict[str, Bucket] = {}
        for unit, names in units.items():
            layout = lay_out(unit, [(name, tuple(parameters[name].shape)) for name in names], mesh.dp.size)
            values = {name: parameters[name].detach().clone() for name in names}
            bucket = Bucket(
                layout,
                {name: parameters[name] for name in names},
                region=layout.whole if stage == 0 else layout.slice(mesh.dp.index),
                param_dtype=param_dtype,
                grad_dtype=grad_dtype,
                device=mesh.device,
                shared_with=self.buckets.get(owner_of.get(unit, "")),
            )
            bucket.describe(specs, mesh.tp.size, mesh.tp.index, sequence_parallel)
            self.buckets[unit] = bucket
            self._load(bucket, values)

    def _load(self, bucket: Bucket, values: dict[str, Tensor]) -> None:
        """Fills parameters, and the master weights from the same unrounded values."""
        if bucket.shared_with is not None:
            return
        whole = torch.zeros_like(bucket.gradients)
        for slot in bucket.layout.slots:
            whole[slot.interval.start : slot.interval.stop] = values[slot.name].flatten().to(whole.dtype)
        bucket.parameters.copy_(whole)
        bucket.master.copy_(whole[bucket.region.start : bucket.region.stop])

    def updated_buckets(self) -> Iterator[Bucket]:
        """The buckets whose parameters live here; a tied table that shares its owner's memory is left out."""
        return (bucket for bucket in self.buckets.values() if bucket.shared_with is None)

    def zero_gradients(self) -> None:
        for bucket in self.buckets.values():
            bucket.zero_gradients()

    def reduce_gradients(self) -> None:
        """Sums this rank's gradients over the axes on which they are partial; each region is then complete."""
        for bucket in self.buckets.values():
            bucket.clear_stale_gradients()
            self._sum_over_tp(bucket)
        for bucket in self.buckets.values():
            self.sum_over_dp(bucket)
        for owner, follower in self.tied_pairs:
            self._add_tied(owner, follower)

    def _sum_over_tp(self, bucket: Bucket) -> None:
        if not bucket.partial_sums:
            return
        buffer = bucket.gradients.new_zeros(bucket.partial_buffer_size)
        for part in bucket.partial_sums:
            buffer[part.place.start : part.place.stop] = bucket.gradients[part.local.start : part.local.stop]
        collectives.all_reduce(buffer, self.mesh.tp)
        for part in bucket.partial_sums:
            bucket.gradients[part.local.start : part.local.stop] = buffer[part.place.start : part.place.stop]

    def sum_over_dp(self, bucket: Bucket) -> None:
        dp = self.mesh.dp
        if dp.size == 1:
            return
        own = bucket.layout.slice(dp.index)
        total = collectives.reduce_scatter(bucket.gradients, dp)
        if self.stage == 0:
            collectives.all_gather(total, dp, out=bucket.gradients)
        else:
            bucket.gradients[own.start : own.stop] = total

    def _add_tied(self, owner: str, follower: str) -> None:
        """Adds the gradients of the two uses of a tied table: here, or by exchange between the stages of the uses."""
        here = [name for name in (owner, follower) if name in self.buckets]
        if len(here) == 2:
            self.buckets[owner].region_gradients().add_(self.buckets[follower].region_gradients())
        elif here:
            (name,) = here
            other = self._stages_of[follower if name == owner else owner]
            forward, back = self.mesh.pp, self.mesh.pp_return
            to_other, from_other = (forward, back) if other > forward.index else (back, forward)
            own = self.buckets[name].region_gradients()
            received = torch.empty_like(own)
            receiving = collectives.start_receive(received, from_other, other)
            sending = collectives.start_send(own.clone(), to_other, other)
            own.add_(receiving.wait())
            sending.wait()

    def counted_gradients(self) -> Iterator[tuple[Tensor, list[Interval]]]:
        """This rank's slice of each gradient, with the elements that do not count here in the norm.

        The slices of all ranks together hold every element of the model's gradient exactly once.
        """
        for bucket in self.buckets.values():
            own = bucket.layout.slice(self.mesh.dp.index)
            skipped = [interval.intersect(own).shift(-own.start) for interval in bucket.uncounted]
            yield bucket.gradients[own.start : own.stop], [interval for interval in skipped if interval.size]

    def round_master_weights(self) -> None:
        """Writes the master weights into this rank's region of the parameters, where an optimizer's step did not."""
        for bucket in self.updated_buckets():
            if (rounded := bucket.rounded_region()) is not None:
                rounded.copy_(bucket.master)

    def gather_parameters(self) -> None:
        """After the optimizer's step, which wrote each rank's region of the parameters: makes them whole."""
        for bucket in self.updated_buckets():
            if self.stage > 0:
                region = bucket.parameters[bucket.region.start : bucket.region.stop]
                collectives.all_gather(region.clone(), self.mesh.dp, out=bucket.parameters)

    def whole_gradient(self, name: str) -> Tensor:
        """This rank's gradient of a parameter, whole over dp, after ``reduce_gradients``. For proofs, not for speed.

        A tied parameter has the sum over both of its uses. It is never clipped: the optimizer's step multiplies by the
        factor as it reads.
        """
        return self._whole(name, Bucket.region_gradients)

    def whole_master(self, name: str) -> Tensor:
        """This rank's master weight of a parameter, whole over dp."""
        return self._whole(name, lambda bucket: bucket.master)

    def _whole(self, name: str, regional: Callable[[Bucket], Tensor]) -> Tensor:
        for bucket in self.buckets.values():
            for slot in bucket.layout.slots:
                if slot.name == name:
                    region = regional(bucket.shared_with or bucket)
                    flat = region if self.stage == 0 else collectives.all_gather(region, self.mesh.dp)
                    return flat[slot.interval.start : slot.interval.stop].view(slot.shape).clone()
        raise KeyError(f"{name} is not on this pipeline stage")
