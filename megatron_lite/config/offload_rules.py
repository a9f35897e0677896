"""Rules of the offload section: what can be offloaded at a ZeRO stage, and where files go."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.nearest import Rule, fixes
from megatron_lite.config.problems import Problem, override
from megatron_lite.config.values import Values

_STAGES = {"gradients": (2, ">= 2"), "parameters": (3, "= 3")}
_WHAT = ("optimizer", "gradients", "parameters")


def only_slices_are_offloaded(v: Values) -> Iterator[Problem]:
    stage = v["parallel.zero_stage"]
    for what, (least, condition) in _STAGES.items():
        key = f"offload.{what}"
        if v[key] != "none" and stage < least:
            rule = f"needs parallel.zero_stage {condition}, which leaves a rank slices of {what}; it is {stage}"
            yield Problem(key, v[key], rule, "", fixes("parallel.zero_stage", [least]) + fixes(key, ["none"]))


def files_have_a_folder(v: Values) -> Iterator[Problem]:
    in_files = [f"offload.{what}" for what in _WHAT if v[f"offload.{what}"] == "nvme"]
    folder, key = v["offload.dir"], "offload.dir"
    if in_files and folder is None:
        rule = f"must name a folder: {' and '.join(in_files)} = nvme keep{'s' * (len(in_files) == 1)} files there"
        remedy = "or give a folder on a disk of each machine's own"
        yield Problem(key, folder, rule, remedy, (tuple(override(name, "cpu") for name in in_files),))
    elif folder is not None and not in_files:
        rule = "is given, and nothing is offloaded to it"
        yield Problem(key, folder, rule, "", fixes("offload.optimizer", ["nvme"]) + fixes(key, [None]))


RULES: tuple[Rule, ...] = (only_slices_are_offloaded, files_have_a_folder)
