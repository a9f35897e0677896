"""Faults on purpose: take one reduction out of a built run, to show that the proof notices.

A proof that cannot fail proves nothing. ``megatron-lite verify CONFIG --without NAME`` runs with the named reduction
missing and has to end in failure; the tests do so for each of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from megatron_lite.distributed.mesh import Axis
from megatron_lite.train.build import Training


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
    training.engine.sum_over_dp = lambda bucket: None  # type: ignore[method-assign]


def _loss_normaliser(training: Training) -> None:
    training.targets_axis = _alone(training.targets_axis)


def _gradient_norm(training: Training) -> None:
    training.norm_axis = _alone(training.norm_axis)


REDUCTIONS: dict[str, tuple[str, Callable[[Training], None]]] = {
    "sequence-parallel-norms": ("sum of norm and bias gradients over tp under sequence parallelism", _norm_gradients),
    "kv-heads": ("sum of the gradients of a key-value head over the tp ranks that share it", _kv_head_gradients),
    "tied-embeddings": ("sum of the gradients of a tied embedding over its two uses in a pipeline", _tied_embeddings),
    "data-parallel": ("sum of gradients over dp", _data_parallel_sum),
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
