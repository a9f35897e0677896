"""Faults on purpose: take one reduction or gather out of a built run, to show that the proof notices.

A proof that cannot fail proves nothing. ``megatron-lite verify CONFIG --without NAME`` runs with the named reduction
missing and has to end in failure; the tests do so for each of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from megatron_lite.distributed.collectives import Pending
from megatron_lite.distributed.mesh import Axis
from megatron_lite.train.build import Training
from megatron_lite.zero.bucket import Bucket
from megatron_lite.zero.gradients import Gradients


def _alone(axis: Axis) -> Axis:
    """The axis as if no other rank were on it: collectives over it do nothing."""
    return dataclasses.replace(axis, size=1, index=0)


def _norm_gradients(training: Training) -> None:
    whole = {spec.name for spec in training.table if spec.shard_dim is None}
    for bucket in training.engine.buckets.values():
        bucket.partial_sums = [part for part in bucket.partial_sums if part.parameter not in whole]


def _kv_head_gradients(training: Training) -> None:
    sliced = {spec.name for spec in training.table if spec.shard_dim is not None}
    for bucket in training.engine.buckets.values():
        bucket.partial_sums = [part for part in bucket.partial_sums if part.parameter not in sliced]


def _tied_embeddings(training: Training) -> None:
    if training.mesh.pp.size > 1:
        training.engine.tied_pairs = []


def _data_parallel_sum(training: Training) -> None:
    reduction = training.engine.reduction

    def keep_own(bucket: Bucket, gradients: Tensor) -> None:
        reduction.add(bucket, gradients[bucket.slice.start : bucket.slice.stop])

    reduction.sum_over_dp = keep_own  # type: ignore[method-assign]


def _last_gradient(training: Training) -> None:
    def as_it_is_now(gradients: Gradients) -> None:
        take = gradients.take
        gradients.take = lambda key: take(key).clone()  # type: ignore[method-assign]

    if training.engine.gathering is not None:  # parameters stay whole: it is the sum alone that comes too early
        training.engine.gathering.done = lambda bucket: None  # type: ignore[method-assign]
    for bucket in training.engine.buckets.values():
        bucket.gradients.num_expected = max(1, len(bucket.parameters) - 1)
        as_it_is_now(bucket.gradients)


def _updated_parameters(training: Training) -> None:
    engine = training.engine
    if engine.mesh.shard.size == 1:
        return
    stale = next(engine.updated_buckets())
    if engine.gathering is None:
        # Kept from before the first update: gathers begin early, and one may be over when the next line is reached.
        gather, before = engine.gather_parameters, stale.flat.clone()

        def gather_others() -> None:
            gather()
            stale.flat.copy_(before)

        engine.gather_parameters = gather_others  # type: ignore[method-assign]
    else:
        collect, old = engine.gathering.collect, stale.values.clone()

        def collect_old(owner: Bucket, values: Tensor) -> Pending:
            return collect(owner, old if owner is stale else values)

        engine.gathering.collect = collect_old  # type: ignore[method-assign]


def _loss_normaliser(training: Training) -> None:
    training.targets_axis = _alone(training.targets_axis)


def _gradient_norm(training: Training) -> None:
    training.norm_axis = _alone(training.norm_axis)


REDUCTIONS: dict[str, tuple[str, Callable[[Training], None]]] = {
    "sequence-parallel-norms": ("sum of norm and bias gradients over tp under sequence parallelism", _norm_gradients),
    "kv-heads": ("sum of the gradients of a key-value head over the tp ranks that share it", _kv_head_gradients),
    "tied-embeddings": ("sum of the gradients of a tied embedding over its two uses in a pipeline", _tied_embeddings),
    "data-parallel": ("sum of gradients over dp", _data_parallel_sum),
    "last-gradient": ("last gradient of each layer, before which its sum over dp begins", _last_gradient),
    "updated-parameters": ("gather of a layer's updated parameters over dp", _updated_parameters),
    "loss-normaliser": ("count of the global batch's target tokens over dp", _loss_normaliser),
    "gradient-norm": ("sum of squared gradients over all ranks", _gradient_norm),
}


def check_reduction(name: str) -> None:
    """Raises ValueError, with the list, unless ``name`` is a key of ``REDUCTIONS``."""
    if name not in REDUCTIONS:
        known = "".join(f"\n  {key}: the {what}" for key, (what, _) in REDUCTIONS.items())
        raise ValueError(f"{name!r} is no reduction; the reductions are{known}")


def remove_reduction(training: Training, name: str) -> None:
    """Takes the reduction ``name`` (a key of ``REDUCTIONS``) out of a run that was just built."""
    check_reduction(name)
    REDUCTIONS[name][1](training)
