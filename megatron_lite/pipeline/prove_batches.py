"""Proves every schedule that a run uses: one for each size of its global batch."""

from __future__ import annotations

from megatron_lite.config.batch_rampup import batch_sizes, with_batch_size
from megatron_lite.config.schema import RunConfig
from megatron_lite.pipeline.instructions import ScheduleError
from megatron_lite.pipeline.prove import Proof, prove_run


def prove_batches(config: RunConfig) -> Proof:
    """Proves the schedule of each batch size of ``train.batch_rampup`` once, or the only one; returns the last proof.

    config: its ``parallel.dp`` is known. Raises ScheduleError, with the batch size if it is one on the way.
    """
    *smaller, full = batch_sizes(config.train)
    for size in smaller:
        try:
            prove_run(with_batch_size(config, size))
        except ScheduleError as error:
            raise ScheduleError(f"while train.batch_rampup gives a batch of {size}: {error}") from error
    return prove_run(with_batch_size(config, full))
