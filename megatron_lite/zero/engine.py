"""ZeRO on flat buckets (Rajbhandari et al. 2020): one mechanism; the stage says what is whole and what is a slice.

A step: backward adds into each bucket's gradients; `reduce.py` sums them over ranks as they become complete;
``finish_gradients`` waits for that and adds the two uses of a tied table; the optimizer updates this rank's region of
the master weights and of the parameters; ``gather_parameters`` makes these whole again, or at stage 3 `gather.py` does
when they are used. Contributions of ranks are added in rank order, by the same partition at every stage, so the stages
agree in every bit.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lite.distributed import collectives
from megatron_lite.distributed.mesh import Mesh
from megatron_lite.models.identity import ParameterTable
from megatron_lite.zero.bucket import Bucket, Keep, MemoryPlan
from megatron_lite.zero.gather import Gathering
from megatron_lite.zero.gradients import STEP
from megatron_lite.zero.offload import loaded
from megatron_lite.zero.partition import Interval, lay_out, unit_of
from megatron_lite.zero.reduce import Reduction, Traffic


class ZeroEngine:
    """Owns the memory of a model's parameters and gradients on this rank, and says when what of it is whole.

    Args:
        shapes: of this rank's parameters by global name, for each chunk of the model here.
        weights: the values of a parameter on this tp rank, by name.
        stages_of: pipeline stage that holds each parameter of a tied pair, by name.
        reduces_each_microbatch: gradients are summed over dp in each microbatch, and then over microbatches.
        keep: makes the tensors that may lie elsewhere than on the device; None: nothing does.

    ``units``: the buckets of each chunk. ``traffic``: what has gone over dp so far. ``gathering``: at stage 3, what
    collects whole parameters.
    """

    def __init__(
        self,
        shapes: Mapping[int, Mapping[str, tuple[int, ...]]],
        table: ParameterTable,
        *,
        mesh: Mesh,
        stage: int,
        param_dtype: torch.dtype,
        grad_dtype: torch.dtype,
        master_dtype: torch.dtype,
        sequence_parallel: bool,
        stages_of: dict[str, int],
        weights: Callable[[str], Tensor],
        reduces_each_microbatch: bool = False,
        keep: Keep | None = None,
    ) -> None:
        self.mesh, self.stage = mesh, stage
        self.tied_pairs = table.tied_pairs()
        self._stages_of = stages_of
        self._key_of: Callable[[int], int] = (lambda m: m) if reduces_each_microbatch else (lambda m: STEP)
        memory = MemoryPlan(
            stage=stage,
            num_shards=mesh.shard.size,
            shard_index=mesh.shard.index,
            share_index=mesh.shard.index * mesh.replica.size + mesh.replica.index,
            param_dtype=param_dtype,
            master_dtype=master_dtype,
            grad_dtype=grad_dtype,
            reduces_each_microbatch=reduces_each_microbatch,
        )
        self.buckets: dict[str, Bucket] = {}
        self.units: dict[int, list[Bucket]] = {}
        specs = {spec.name: spec for spec in table}
        for chunk, parameters in shapes.items():
            layouts = self._layouts(parameters)
            self.units[chunk] = []
            for unit, names in layouts.items():
                layout = lay_out(unit, [(name, parameters[name]) for name in names], mesh.dp.size)
                owner = next((owner for owner, follower in self.tied_pairs if follower == unit), "")
                shared_with = self.buckets.get(owner)
                bucket = Bucket(layout, memory, device=mesh.device, shared_with=shared_with, keep=keep)
                bucket.describe(specs, mesh.tp.size, mesh.tp.index, sequence_parallel)
                if bucket.shared_with is None:
                    bucket.fill(weights)
                self.buckets[unit] = bucket
                self.units[chunk].append(bucket)
        self.traffic = Traffic()
        self.reduction = Reduction(mesh, self.traffic)
        self.gathering = Gathering(mesh.shard, self.traffic) if stage == 3 else None
        self._backward: tuple[int, int] | None = None  # chunk and microbatch whose backward runs
        self._starts_sums = False  # whether a bucket that this backward completes is summed at once
        self._started: set[tuple[str, int]] = set()  # buckets whose sums have begun, and their keys
        self._gathers: dict[str, collectives.Pending] = {}  # of updated parameters, by bucket
        for bucket in self.buckets.values():
            bucket.gradients.on_complete = lambda bucket=bucket: self._completed(bucket)  # type: ignore[misc]
        if self.gathering is not None:
            for chunk, buckets in self.units.items():
                self.gathering.add(chunk, buckets)

    def _layouts(self, names: Mapping[str, Any]) -> dict[str, list[str]]:
        """Names of a chunk's parameters by unit, in the order of the model; a tie's owner before its follower."""
        tied = [name for pair in self.tied_pairs for name in pair]
        units: dict[str, list[str]] = {}
        for name in names:
            units.setdefault(unit_of(name, tied), []).append(name)
        return units

    def updated_buckets(self) -> Iterator[Bucket]:
        """The buckets whose parameters live here; a tied table that shares its owner's memory is left out."""
        return (bucket for bucket in self.buckets.values() if bucket.shared_with is None)

    # Around the computing: what a schedule's instructions and autograd's hooks call.

    def attach(self, chunk: int, model: nn.Module) -> None:
        """Puts the parameters into a chunk of the model, and hooks on its parts, so that parameters are whole while
        they are used and gradients have memory to go to."""
        for bucket in self.units[chunk]:
            for name, parameter in bucket.parameters.items():
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, parameter)
        if self.gathering is None and all(b.memory.keeps_whole_gradients for b in self.units[chunk]):
            return
        inside = {
            part: [b for b in self.units[chunk] if any(_is_inside(name, part_name) for name in b.parameters)]
            for part_name, part in _parts(model)
        }
        last = {bucket: part for part, buckets in inside.items() for bucket in buckets}
        for part, buckets in inside.items():
            ends = [bucket for bucket in buckets if last[bucket] is part]
            part.register_forward_pre_hook(lambda *_, buckets=buckets: self._use(buckets))
            part.register_forward_hook(
                lambda _1, _2, output, buckets=buckets, ends=ends: self._after_forward(buckets, ends, output)
            )

    def _use(self, buckets: list[Bucket]) -> None:
        if self.gathering is not None:
            for bucket in buckets:
                self.gathering.use(bucket)

    def _after_forward(self, buckets: list[Bucket], ends: list[Bucket], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: self._before_backward(buckets))
        if self.gathering is not None and self._backward is None:  # else it is recomputed, and its backward follows
            for bucket in ends:
                self.gathering.done(bucket)

    def _before_backward(self, buckets: list[Bucket]) -> None:
        self._use(buckets)
        assert self._backward is not None
        for bucket in buckets:
            bucket.gradients.open(self._key_of(self._backward[1]))

    def _completed(self, bucket: Bucket) -> None:
        """The last gradient of a bucket has come in a backward."""
        if self.gathering is not None:
            self.gathering.done(bucket)
        if self._starts_sums and self._backward is not None:
            self._start_sum(bucket, self._key_of(self._backward[1]))

    @contextmanager
    def running(self, run: Hashable) -> Iterator[None]:
        """Around the run of a schedule; those with an equal ``run`` go through the chunks in the same order."""
        if self.gathering is None:
            yield
            return
        self.gathering.begin(run)
        is_done = False
        try:
            yield
            is_done = True
        finally:
            self.gathering.end(takes_down=is_done)

    def open_chunk(self, chunk: int, *, keep: bool) -> None:
        """GATHER_PARAMETERS: the chunk is about to be used. keep: until ``close_chunk`` what was used stays whole."""
        if self.gathering is not None:
            self.gathering.open(chunk, keep=keep)

    def close_chunk(self, chunk: int) -> None:
        """RELEASE_PARAMETERS."""
        if self.gathering is not None:
            self.gathering.close(chunk)

    @contextmanager
    def backward(self, chunk: int, microbatch: int, *, is_weight_half: bool, starts_sums: bool) -> Iterator[None]:
        """Around a backward, or a half of one. starts_sums: what it completes is what a sum over dp waits for."""
        key = self._key_of(microbatch)
        for bucket in self.units[chunk]:
            bucket.gradients.expect()
            if is_weight_half:
                bucket.gradients.open(key)
        self._backward, self._starts_sums = (chunk, microbatch), starts_sums
        try:
            yield
        finally:
            self._backward, self._starts_sums = None, False
        if key != STEP:
            for bucket in self.units[chunk]:
                bucket.gradients.close()

    def start_reduction(self, chunk: int, microbatch: int) -> None:
        """START_REDUCTION: begins the sums that backward has not begun by itself.

        microbatch: whose gradients; any, where they are summed once a step.
        """
        for bucket in reversed(self.units[chunk]):
            self._start_sum(bucket, self._key_of(microbatch))

    def _start_sum(self, bucket: Bucket, key: int) -> None:
        if (bucket.layout.name, key) not in self._started:
            self._started.add((bucket.layout.name, key))
            self.reduction.start(bucket, key)

    # Around the update.

    def zero_gradients(self) -> None:
        """A step begins."""
        self._started.clear()
        self.reduction.reset()
        for bucket in self.buckets.values():
            bucket.gradients.reset()

    def finish_gradients(self) -> None:
        """REDUCE_GRADIENTS: each region of ``sums`` then holds the gradient of the whole batch's loss."""
        for bucket in self.buckets.values():
            for key in bucket.gradients.held:
                self._start_sum(bucket, key)
        self.reduction.finish(list(self.buckets.values()))
        for owner, follower in self.tied_pairs:
            self._add_tied(owner, follower)

    def _add_tied(self, owner: str, follower: str) -> None:
        """Adds the gradients of the two uses of a tied table: here, or by exchange between the stages of the uses."""
        here = [name for name in (owner, follower) if name in self.buckets]
        if len(here) == 2:
            into, added = (self.buckets[name].stored["sums"] for name in here)
            with loaded(into, writes=True) as sums, loaded(added) as others:
                sums.add_(others)
        elif here:
            (name,) = here
            other = self._stages_of[follower if name == owner else owner]
            forward, back = self.mesh.pp, self.mesh.pp_return
            to_other, from_other = (forward, back) if other > forward.index else (back, forward)
            with loaded(self.buckets[name].stored["sums"], writes=True) as own:
                received = torch.empty_like(own, device=self.mesh.device)
                receiving = collectives.start_receive(received, from_other, other)
                sending = collectives.start_send(own.to(self.mesh.device, copy=True), to_other, other)
                own.add_(receiving.wait().to(own.device))
                sending.wait()

    def counted_gradients(self) -> Iterator[tuple[Tensor, list[Interval]]]:
        """This rank's share of each gradient, with the elements that do not count here in the norm.

        The shares of all ranks together hold every element of the model's gradient exactly once.
        """
        for bucket in self.buckets.values():
            own, share = bucket.share, bucket.share.shift(-bucket.region.start)
            skipped = [interval.intersect(own).shift(-own.start) for interval in bucket.uncounted]
            with loaded(bucket.stored["sums"]) as sums:
                yield sums[share.start : share.stop], [interval for interval in skipped if interval.size]

    def round_master_weights(self) -> None:
        """Writes the master weights into this rank's region of the parameters, where an optimizer's step did not."""
        for bucket in self.updated_buckets():
            if bucket.weights_kind != "values":
                bucket.values.copy_(bucket.master)

    def gather_parameters(self) -> None:
        """After the optimizer's step, which wrote each rank's region of the parameters: makes them whole."""
        if self.gathering is not None:
            self.gathering.forget()
            return
        for bucket in self.updated_buckets():
            self.start_gather(bucket)
        while self._gathers:
            self._gathers.popitem()[1].wait()

    def start_gather(self, bucket: Bucket) -> None:
        """Begins what ``gather_parameters`` waits for, of a bucket that has been updated."""
        if self.stage in (0, 3) or self.mesh.shard.size == 1 or bucket.layout.name in self._gathers:
            return
        self.traffic.gathered_bytes += bucket.flat.nbytes
        gather = collectives.start_all_gather(bucket.values.clone(), self.mesh.shard, out=bucket.flat)
        self._gathers[bucket.layout.name] = gather

    def resident_parameters(self) -> Iterator[Tensor]:
        """The memory that says what the parameters are: who writes there calls ``parameters_changed`` afterwards."""
        return (bucket.values if self.stage == 3 else bucket.flat for bucket in self.updated_buckets())

    def parameters_changed(self) -> None:
        if self.gathering is not None:
            self.gathering.forget()

    def whole_gradient(self, name: str) -> Tensor:
        """This rank's gradient of a parameter, whole over dp, after ``finish_gradients``. For proofs, not for speed.

        A tied parameter has the sum over both of its uses. It is never clipped: the optimizer's step multiplies by the
        factor as it reads.
        """
        return self._whole(name, lambda bucket: bucket.sums)

    def whole_master(self, name: str) -> Tensor:
        """This rank's master weight of a parameter, whole over dp."""
        return self._whole(name, lambda bucket: bucket.master)

    def _whole(self, name: str, regional: Callable[[Bucket], Tensor]) -> Tensor:
        for bucket in self.buckets.values():
            for slot in bucket.layout.slots:
                if slot.name == name:
                    region = regional(bucket.owner)
                    region = region.to(self.mesh.device)
                    flat = region if self.stage == 0 else collectives.all_gather(region, self.mesh.shard)
                    return flat[slot.interval.start : slot.interval.stop].view(slot.shape).clone()
        raise KeyError(f"{name} is not on this pipeline stage")


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What a model's forward goes through: its children, and each layer instead of all of them."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleDict):
            yield from ((f"{name}.{key}", layer) for key, layer in child.items())
        else:
            yield name, child


def _is_inside(parameter: str, part: str) -> bool:
    return parameter.startswith(f"{part}.")
