"""The weights that an optimizer updates, where they are kept in less than it computes in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from megatron_lite.checkpoint.chunks import chunks_in_memory
from megatron_lite.optim.stochastic_rounding import round_stochastically, rounding_key
from megatron_lite.zero.bucket import Bucket

if TYPE_CHECKING:  # it builds what is updated here
    from megatron_lite.train.build import Training


@contextmanager
def weights_to_update(training: Training, bucket: Bucket, own: Tensor) -> Iterator[Tensor]:
    """The weights of a bucket's region, flat, in what the optimizer computes in. It updates them, once, within.

    own: the bucket's own, ``[region]``. It is they that are updated, but for stochastic rounding: then a copy in fp32,
    which lives as long as the update of this bucket, and at its end goes back, rounded. How an element is rounded
    depends on the seed, the number of the update, and the parameter's name and the element's place in it, so ranks that
    hold the same element agree.
    """
    if not training.precision.rounds_stochastically:
        yield own
        return
    wide = own.to(training.precision.moments)
    yield wide
    tp, update = training.mesh.tp, training.optimizer_states[bucket.layout.name].num_steps
    for slot in bucket.layout.slots:
        spec = training.table[slot.name]
        key = rounding_key(training.config.train.seed, spec.tied_to or spec.name, update)
        sources, targets = (
            chunks_in_memory(
                *(spec, tp.size, tp.index, memory), memory_start=bucket.region.start, shard_start=slot.start
            )
            for memory in (wide, own)
        )
        for source, target in zip(sources, targets, strict=True):
            round_stochastically(source.values, target.values, key=key, offsets=source.offsets, shape=spec.shape)
