"""Whether two configs are of one run: which keys may change between a checkpoint and the run that goes on from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from megatron_lite.config.files import pair_paths
from megatron_lite.config.schema import RunConfig
from megatron_lite.data.cache import content_mark

# Keys that say which numbers a run computes, beside its length, its learning rate and its precision, which a user may
# want to change on the way.
_IDENTITY = ("model", "data", "train.seed", "train.seq_len")
# Of these, keys that no step depends on once there are weights, and those that the shapes of the weights speak for.
_HARMLESS = frozenset(
    {
        "model.init_std",
        "model.max_seq_len",
        "model.tie_embeddings",
        "data.cache",
        "data.test",
        "data.tokenizer",
        "data.valid",
    }
)

# Keys and sections that may change on the way, and change numbers.
_SETTINGS = (
    "train.precision",
    "train.micro_batch_size",
    "train.global_batch_size",
    "train.batch_rampup",
    "parallel.reduce_policy",
    "parallel.zero_group",
    "optim.",
    "loss_scale.",
)


# What each host may have in its own way. Folders of the run and of its data are not among them: all ranks write to the
# one and read the other.
_OF_A_HOST = frozenset(
    {
        "data.cache",
        "offload.dir",
        "run.network_interface",
        "run.rendezvous_timeout_s",
        "run.stop_grace_s",
        "train.threads",
    }
)


def shared_settings(config: RunConfig) -> dict[str, Any]:
    """What has to be the same on every rank, by its dotted key."""
    return {key: value for key, value in _leaves(saved_config(config)).items() if key not in _OF_A_HOST}


def changed_keys(before: dict[str, Any], now: RunConfig) -> list[str]:
    """What makes ``now`` another run than the config ``before`` (of `saved_config`), a sentence for each key.

    Not among them is what a run may change on the way and still be the same: its layout, batch and micro-batch, number
    of steps, optimizer settings, precision, kernels, where it reports to.
    """
    return [change for key in _IDENTITY for change in _changes(key, _at(before, key), _at(saved_config(now), key))]


def changed_settings(before: dict[str, Any], now: RunConfig) -> list[str]:
    """What a run may change on the way and that changes its numbers, as ``key old -> new``.

    before: a config of `saved_config`; a key that it does not have, as it is older, is not among them.
    """
    then, since = (_leaves(one) for one in (before, saved_config(now)))
    return [
        f"{key} {_shown(then[key])} -> {_shown(value)}"
        for key, value in since.items()
        if key.startswith(_SETTINGS) and key in then and then[key] != value
    ]


def data_marks(config: RunConfig) -> dict[str, Any]:
    """The content mark of each file of the training data, by its path, as far as they are there."""
    paths = [path for prefix in config.data.train for path in pair_paths(prefix)]
    return {str(path): content_mark(path) for path in paths if path.is_file()}


def changed_data(before: Any, now: RunConfig) -> list[str]:
    """A sentence for each file of training data that is not what it was when ``before`` (of `data_marks`) was taken."""
    marks = data_marks(now) if isinstance(before, dict) else {}
    return [
        f"{path} had {before[path]['bytes']:,} bytes and is another file now, of {mark['bytes']:,}"
        for path, mark in marks.items()
        if path in before and before[path] != mark
    ]


def saved_config(config: RunConfig) -> dict[str, Any]:
    """The config as JSON gives it back."""
    return config.model_dump(mode="json")


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _leaves(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Values by their dotted keys."""
    leaves = dict[str, Any]()
    for name, value in tree.items():
        leaves |= _leaves(value, f"{path}{name}.") if isinstance(value, dict) else {f"{path}{name}": value}
    return leaves


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _changes(key: str, before: Any, now: Any) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys((*now, *before)):
            yield from _changes(f"{key}.{name}", before.get(name), now.get(name))
    elif before != now and key not in _HARMLESS:
        yield f"{key} was {json.dumps(before)} and is {json.dumps(now)}"
