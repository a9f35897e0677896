"""Bytes of the training state on a rank, bucket for bucket, as `megatron_lite.zero` allocates them. Exact.

Of a bucket of S elements (padding included), with G ranks that share slices and c, g, m bytes an element in the dtypes
of computing, of gradients and of master weights (Rajbhandari et al. 2020, section 5; table 1 there has c = g = 2 and
12 for master weights and two moments):

===============  =======  ============  ============  ===========================================
ZeRO stage       0        1             2             3
===============  =======  ============  ============  ===========================================
parameters       S c      S c           S c           S c / G
gradients        S g      S g           S g / G       S g / G
master weights   S m      S m / G       S m / G       S m / G; none where c and m are one dtype
a moment         S m      S m / G       S m / G       S m / G
===============  =======  ============  ============  ===========================================

A tied table whose two uses lie on one pipeline rank has one set of everything but gradients, of which it has two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_lite.config.schema import OptimConfig, RunConfig, TrainConfig
from megatron_lite.models.families import parameter_table
from megatron_lite.optim.state_sizes import state_elements
from megatron_lite.pipeline.instructions import Placement
from megatron_lite.pipeline.partition import chunk_of
from megatron_lite.planner.amounts import Amount, placed
from megatron_lite.zero.partition import BucketLayout, Interval, lay_out, unit_of

# Bytes of an element: of what is computed in, and of master weights.
ITEM_SIZES = {"fp32": (4, 4), "bf16": (2, 4), "fp16": (2, 4), "fp64": (8, 8)}


@dataclass(frozen=True)
class ItemSizes:
    """Bytes of an element of each kind. master: 0 where master weights are the parameters themselves."""

    compute: int
    gradient: int
    master: int
    moment: int


def item_sizes(train: TrainConfig) -> ItemSizes:
    compute, master = ITEM_SIZES[train.precision]
    is_view = compute == master or train.stochastic_rounding
    return ItemSizes(
        compute=compute,
        gradient=compute if train.grad_dtype == "param" else master,
        master=0 if is_view else master,
        moment=master,
    )


def moment_bytes(optim: OptimConfig, layout: BucketLayout, region: Interval, item_size: int) -> int:
    """Of what the optimizer keeps for the elements ``region`` of a bucket."""
    return sum(state_elements(optim, layout.slots, region.start, region.stop).values()) * item_size


@dataclass(frozen=True)
class Unit:
    """A bucket on a rank. shares: its parameters are those of another bucket here, which it is tied to."""

    layout: BucketLayout
    shares: bool

    @property
    def largest_parameter(self) -> int:
        """Elements."""
        return max(slot.interval.size for slot in self.layout.slots)


def units_of(config: RunConfig, placement: Placement, chunk_layers: Sequence[int], stage: int) -> list[Unit]:
    """The buckets of a pipeline rank, in the order in which the model uses them.

    They are alike on all tensor-parallel and data-parallel ranks. chunk_layers: number of layers of each chunk.
    """
    table = parameter_table(config.model)
    tied = [name for pair in table.tied_pairs() for name in pair]
    owner_of = {follower: owner for owner, follower in table.tied_pairs()}
    shapes: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for spec in table:
        if placement.rank_of[chunk_of(spec.name, chunk_layers)] == stage:
            shape = spec.shard(config.parallel.tp, 0).shape
            shapes.setdefault(unit_of(spec.name, tied), []).append((spec.name, shape))
    return [
        Unit(lay_out(name, of_unit, config.dp), shares=owner_of.get(name, "") in shapes)
        for name, of_unit in shapes.items()
    ]


@dataclass(frozen=True)
class State:
    """What a rank keeps from step to step."""

    parameters: Amount
    gradients: Amount
    master: Amount
    moments: Amount


def num_slices(config: RunConfig) -> int:
    """Ranks that share the slices of a bucket."""
    return config.parallel.zero_group or config.dp


def keeps_whole_gradients(config: RunConfig) -> bool:
    """Whether a rank's own gradients lie whole in memory that stays, as `megatron_lite.zero.bucket` has it."""
    parallel = config.parallel
    return parallel.zero_stage < 2 and (parallel.reduce_policy == "step" or parallel.weight_stashing)


def state_of(config: RunConfig, units: Sequence[Unit], device: str, index: int | None = None) -> State:
    """The state of a rank that holds these buckets. device: 'cpu' or 'cuda'.

    index: of its slices; they differ in moments where an optimizer keeps more for some parameters than for others, as
    Muon does. None: of those that have most.
    """
    sizes, offload = item_sizes(config.train), config.offload
    zero, slices = config.parallel.zero_stage, num_slices(config)
    own = [unit for unit in units if not unit.shares]

    def elements(of: Sequence[Unit], sliced_from: int) -> int:
        return sum(unit.layout.size // (slices if zero >= sliced_from else 1) for unit in of)

    def moments(of_slice: int) -> int:
        return sum(
            moment_bytes(
                config.optim,
                unit.layout,
                unit.layout.slice(of_slice, slices) if zero >= 1 else unit.layout.whole,
                sizes.moment,
            )
            for unit in own
        )

    # From the first stage on a sum that is reduced in each microbatch is kept as a slice.
    gradients_from = 2 if keeps_whole_gradients(config) else 1
    indices = range(slices if zero >= 1 and config.optim.name == "muon" else 1) if index is None else [index]
    return State(
        parameters=placed(elements(own, 3) * sizes.compute, offload.parameters if zero == 3 else "none", device),
        gradients=placed(
            elements(units, gradients_from) * sizes.gradient, offload.gradients if zero >= 2 else "none", device
        ),
        master=placed(elements(own, 1) * sizes.master, offload.optimizer, device),
        moments=placed(max(map(moments, indices)), offload.optimizer, device),
    )
