"""How large a global batch is while it grows (GPT-3, arXiv:2005.14165, appendix B): functions of samples consumed.

``train.batch_rampup = [start, increment, samples]`` means what Megatron-LM's ``--rampup-batch-size`` means: the batch
has ``start`` sequences at first and ``increment`` more after each equal share of ``samples``, until it has
``train.global_batch_size``. The position in the data alone decides, so a run that was cut off goes on with the right
size, in any layout.
"""

from __future__ import annotations

from megatron_lite.config.schema import RunConfig, TrainConfig


def batch_size_at(train: TrainConfig, samples: int) -> int:
    """Sequences of the global batch that begins after ``samples`` consumed ones, all data-parallel ranks together.

    In integers: Megatron-LM divides floating-point numbers, and where a share of the samples is no such number its
    size may change one batch later.
    """
    sizes = batch_sizes(train)
    if len(sizes) == 1:
        return sizes[0]
    assert train.batch_rampup is not None and samples >= 0
    *_, over_samples = train.batch_rampup
    return sizes[min(samples, over_samples) * (len(sizes) - 1) // over_samples]


def batch_sizes(train: TrainConfig) -> range:
    """Every size on the way, ascending; without a ramp the one that there is."""
    if train.batch_rampup is None:
        return range(train.global_batch_size, train.global_batch_size + 1)
    start, increment, _ = train.batch_rampup
    return range(start, train.global_batch_size + 1, increment)


def samples_after(train: TrainConfig, num_steps: int, samples: int = 0) -> int:
    """Samples consumed at the end of ``num_steps`` optimizer steps, the first of which begins after ``samples``."""
    while num_steps and (size := batch_size_at(train, samples)) < train.global_batch_size:
        samples, num_steps = samples + size, num_steps - 1
    return samples + num_steps * train.global_batch_size


def with_batch_size(config: RunConfig, batch_size: int) -> RunConfig:
    """The config of a run whose steps are all as those of this size are here."""
    update = {"global_batch_size": batch_size, "batch_rampup": None}
    return config.model_copy(update={"train": config.train.model_copy(update=update)})
