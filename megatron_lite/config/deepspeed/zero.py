"""zero_optimization: the stage, what is offloaded, and groups of ranks that share slices."""

from __future__ import annotations

from typing import Any

from megatron_lite.config.deepspeed.reasons import OFFLOAD, ZERO
from megatron_lite.config.deepspeed.translation import AUTO, Fields
from megatron_lite.config.problems import ABSENT

BOOL, INTEGER, TEXT = "true or false", "an integer", "text"
STAGE, GROUP, DIR = "parallel.zero_stage", "parallel.zero_group", "offload.dir"
GRADIENTS = "offload.gradients"
DEVICES = ("none", "cpu", "nvme")


def read_zero(top: Fields) -> None:
    """Takes parallel.zero_stage, parallel.zero_group and the keys of offload."""
    t = top.translation
    if isinstance(top.peek("zero_optimization"), bool):
        on = top.get("zero_optimization", BOOL)
        t.take("zero_optimization", on, {STAGE: int(on)}, "the old form: true is stage 1")
        return
    zero = top.inside("zero_optimization")
    if zero is None:
        return
    _read_stage(zero)
    _read_offload(zero, "offload_optimizer", "cpu_offload", "offload.optimizer")
    _read_offload(zero, "offload_param", "cpu_offload_param", "offload.parameters")
    zero.drop("cpu_offload_use_pin_memory", BOOL, OFFLOAD["pin_memory"])
    _read_group(zero)
    if zero.gives("zenflow"):
        rule = "updates weights with gradients of earlier steps, which this program does not"
        value = zero.get("zenflow", "an object")
        t.refuse("zero_optimization.zenflow", value, rule, "leave it out")
    zero.rest(ZERO, strict=True)


def _read_stage(zero: Fields) -> None:
    t = zero.translation
    stage = zero.get("stage", INTEGER)
    if isinstance(stage, int) and stage not in (0, 1, 2, 3):
        fixes = ((f"{STAGE}={min(3, max(0, stage))}",),)
        t.refuse("zero_optimization.stage", stage, "must be one of 0, 1, 2, 3", "", fixes, unless=STAGE)
    else:
        zero.move("stage", INTEGER, STAGE, default=0)


def _read_offload(zero: Fields, name: str, old: str, ours: str) -> None:
    """One of offload_optimizer and offload_param, or its older form, which is true or false."""
    t = zero.translation
    part, before = zero.inside(name), zero.get(old, BOOL)
    if before is not ABSENT and part is not None:
        t.refuse(zero.key(old), before, f"is the older form of {name}, and cannot stand beside it", "leave it out")
        before = ABSENT
    if before is True:
        _take_device(zero, zero.key(old), True, "cpu", ours)
    elif before is not ABSENT:
        t.ignore(zero.key(old), before, "nothing is offloaded by it")
    if part is None:
        return
    device = part.get("device", TEXT)
    path = part.get("nvme_path", TEXT)
    if device == AUTO:
        part.keep_ours("device", ours)
    elif device not in (ABSENT, *DEVICES):
        fixes = ((f"{ours}=cpu",),)
        t.refuse(part.key("device"), device, f"must be one of {', '.join(DEVICES)}", "", fixes, unless=ours)
    elif device is not ABSENT:
        _take_device(zero, part.key("device"), device, device, ours)
    elif not part.gives("device"):
        t.ignore(part.key("device"), ABSENT, "DeepSpeed's default is none: nothing is offloaded by it")
    _read_path(part, path, used=t.now(ours) == "nvme")
    part.rest(OFFLOAD, strict=True)


def _take_device(zero: Fields, key: str, value: Any, device: str, ours: str) -> None:
    t, stage = zero.translation, zero.translation.now(STAGE)
    if ours == "offload.parameters" and stage != 3 and device != "none":
        t.ignore(key, value, f"DeepSpeed offloads parameters at stage 3 alone, and {STAGE}={stage}")
        return
    taken, note = {ours: device}, ""
    with_gradients = ours == "offload.optimizer" and device != "none" and stage is not None and stage >= 2
    if with_gradients and GRADIENTS not in t.ours.origins and not t.ours.on_command_line(ours):
        taken[GRADIENTS] = device
        note = "DeepSpeed moves the gradients with the optimizer's state"
    t.take(key, value, taken, note)


def _read_path(part: Fields, path: Any, *, used: bool) -> None:
    t, key = part.translation, part.key("nvme_path")
    if not used:
        if path is not ABSENT:
            t.ignore(key, path, "only nvme has a folder")
    elif path == AUTO:
        part.keep_ours("nvme_path", DIR)
    elif path is ABSENT and not part.gives("nvme_path"):
        if t.now(DIR) is None:
            rule = "is required with device nvme"
            t.refuse(key, ABSENT, rule, "give it, or offload.dir=FOLDER on the command line")
        else:
            t.keep(key, ABSENT, f"{DIR}={t.now(DIR)} stays")
    elif path is not ABSENT and DIR in t.values and t.values[DIR] != path:
        t.ignore(key, path, f"one folder holds the files of both: {DIR}={t.values[DIR]}, of {t.sources[DIR]}")
    elif path is not ABSENT:
        t.take(key, path, {DIR: path})


def _read_group(zero: Fields) -> None:
    """MiCS and ZeRO++ hpZ."""
    t = zero.translation
    sizes = {name: zero.get(name, INTEGER) for name in ("mics_shard_size", "zero_hpz_partition_size")}
    stage = t.now(STAGE)
    notes = {
        "mics_shard_size": "",
        "zero_hpz_partition_size": "hpZ keeps a second copy of the weights in a group, for backward, and slices all "
        "over dp; here weights, gradients and optimizer's state are sliced in the group, and no copy is kept: "
        "fewer bytes are sent, and the state of a rank is dp / zero_group times as large",
    }
    wanted = {name: size for name, size in sizes.items() if isinstance(size, int) and size > 1}
    if sizes["mics_shard_size"] == 1:
        wanted["mics_shard_size"] = 1
    for name, size in sizes.items():
        key = zero.key(name)
        if size == AUTO:
            zero.keep_ours(name, GROUP)
        elif size is not ABSENT and name not in wanted:
            t.ignore(key, size, "off: slices are over all of dp")
        elif size is not ABSENT and stage != 3:
            t.ignore(key, size, f"DeepSpeed reads it at stage 3 alone, and {STAGE}={stage}; {GROUP} works at 1 to 3")
        elif size is not ABSENT and t.values.get(GROUP, size) != size:
            fixes = tuple((f"{GROUP}={n}",) for n in wanted.values())
            rule = f"contradicts {t.sources[GROUP]}, which is {t.values[GROUP]}: there is one group"
            t.refuse(key, size, rule, "", fixes, unless=GROUP)
        elif size is not ABSENT:
            t.take(key, size, {GROUP: size}, notes[name])
