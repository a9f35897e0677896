"""Rules of the data: weights, splits."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.nearest import Rule, fixes
from megatron_lite.config.problems import Problem
from megatron_lite.config.values import Values

_TOLERANCE = 1e-5  # of a sum of fractions that somebody wrote down


def weights_fit_sources(v: Values) -> Iterator[Problem]:
    weights, prefixes, key = v["data.train_weights"], v["data.train"], "data.train_weights"
    if weights and prefixes and len(weights) != len(prefixes):
        many = f"the {len(prefixes)} prefixes" if len(prefixes) > 1 else "the one prefix"
        missing = [min(weights)] * (len(prefixes) - len(weights))
        legal = [*weights[: len(prefixes)], *missing]
        rule = f"must have one weight for each of {many} of data.train"
        yield Problem(key, weights, rule, "", fixes(key, [legal, []]))


def split_is_whole(v: Values) -> Iterator[Problem]:
    split, key = v["data.split"], "data.split"
    if split is None:
        return
    total = sum(split)
    if split[0] == 0:
        rest = round(min(1.0, split[1] + split[2]), 6)
        legal = [[round(1 - rest, 6), *split[1:]]] if 0 < rest < 1 else [[0.98, 0.01, 0.01]]
        yield Problem(key, split, "must leave something to train on, its first fraction", "", fixes(key, legal))
    elif abs(total - 1) > _TOLERANCE:
        valid, test = (round(part / total, 6) for part in split[1:])
        legal = [[round(1 - valid - test, 6), valid, test]]
        yield Problem(key, split, f"must have the sum 1; it is {round(total, 6):g}", "", fixes(key, legal))


def split_takes_the_place_of_paths(v: Values) -> Iterator[Problem]:
    split = v["data.split"]
    for part, key in ((1, "data.valid"), (2, "data.test")):
        if split is None or not v[key] or not split[part]:
            continue
        without = [round(split[0] + split[part], 6), *split[1:]]
        without[part] = 0.0
        rule = f"is given, and so is its part of data.train, {split[part]:g} by data.split; only one can be"
        yield Problem(key, v[key], rule, "", fixes(key, [[]]) + fixes("data.split", [without]))


RULES: tuple[Rule, ...] = (weights_fit_sources, split_is_whole, split_takes_the_place_of_paths)
