"""scheduler: the learning rate over time (DeepSpeed's runtime/lr_schedules.py).

DeepSpeed's schedulers run behind: step t, from 1, has the value of iteration t - 2 (in warm-up and linear decay) or
t - 1 (in cosine decay and a cycle). Ours give step t its own value (`megatron_lite.optim.lr_schedule`).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from megatron_lite.config.deepspeed.translation import AUTO, Fields
from megatron_lite.config.problems import ABSENT, override

BOOL, INTEGER, NUMBER, TEXT = "true or false", "an integer", "a number", "text"
LR, MIN_LR, SCHEDULE = "optim.lr", "optim.min_lr", "optim.schedule"
WARMUP, DECAY = "optim.warmup_steps", "optim.decay_steps"

TYPES: Mapping[str, str] = {
    "WarmupLR": "constant",
    "WarmupDecayLR": "linear",
    "WarmupCosineLR": "cosine",
    "OneCycle": "linear",
}
"""DeepSpeed's type -> optim.schedule."""

_SETS_LR = {"WarmupLR": "warmup_max_lr", "WarmupDecayLR": "warmup_max_lr", "OneCycle": "cycle_max_lr"}
_WARMUP_STEPS, _MAX_LR, _COS_MIN_RATIO, _CYCLE_STEPS = 1000, 1e-3, 1e-4, 2000
_EARLIER: Mapping[str, str] = {
    "WarmupLR": "the same curve, two steps earlier",
    "WarmupDecayLR": "the same curve, two steps earlier",
    "WarmupCosineLR": "the same curve, two steps earlier in warm-up and one in the decay",
    "OneCycle": "the same cycle, one step earlier",
}
_FROM_ZERO = "warm-up starts from 0 here"
_IGNORED = {"last_batch_iteration": "a run that is resumed goes on at its step"}


def lr_from_scheduler(top: Fields) -> str | None:
    """The key of the scheduler that replaces the optimizer's learning rate, if its type has one and gives a value."""
    part = top.peek("scheduler")
    kind = part.get("type") if isinstance(part, dict) else None
    name = _SETS_LR.get(kind) if isinstance(kind, str) else None
    params = (part.get("params") or {}) if isinstance(part, dict) else {}
    if name is None or (isinstance(params, dict) and params.get(name) == AUTO):
        return None
    return f"scheduler.params.{name}"


def read_scheduler(top: Fields) -> None:
    """Takes optim.schedule, warmup_steps, decay_steps and min_lr, and optim.lr where the scheduler sets it."""
    t = top.translation
    part = top.inside("scheduler")
    if part is None:
        if top.gives("optimizer") and not top.gives("scheduler") and t.now(SCHEDULE) != "constant":
            note = f"DeepSpeed without a scheduler has a constant learning rate; {SCHEDULE}={t.now(SCHEDULE)} stays"
            t.keep("scheduler", ABSENT, note)
        return
    kind = part.get("type", TEXT)
    params = part.inside("params") or Fields(t, "scheduler.params", {})
    if kind is ABSENT:
        t.ignore("scheduler.type", ABSENT, "without a type DeepSpeed makes no scheduler")
        params.all_ignored("there is no scheduler")
    elif kind not in TYPES:
        _refuse_type(part, kind)
        params.all_ignored("a setting of another scheduler")
    else:
        taken: dict[str, Any] = {SCHEDULE: TYPES[kind]}
        if kind == "WarmupDecayLR":
            taken[MIN_LR] = 0.0
        t.take("scheduler.type", kind, taken, _EARLIER[kind])
        if kind == "OneCycle":
            _read_cycle(params)
        else:
            _read_warmup(top, params, kind)
        params.rest(_IGNORED, strict=True)
    part.rest({}, strict=False)


def _refuse_type(part: Fields, kind: str) -> None:
    if kind == "LRRangeTest":
        rule = "makes the learning rate grow without end, to find a good one; this program has no such schedule"
    else:
        rule = "is not a scheduler that this program has"
    near = difflib.get_close_matches(kind, TYPES, n=1)
    remedy = f"did you mean {near[0]}?" if near else f"there are {', '.join(TYPES)}"
    have = override(SCHEDULE, part.translation.ours.value(SCHEDULE) or "cosine")
    part.translation.refuse(part.key("type"), kind, rule, remedy, ((have,),), unless=SCHEDULE)


def _read_warmup(top: Fields, params: Fields, kind: str) -> None:
    t = params.translation
    if kind == "WarmupCosineLR":
        _drop_start(params, "warmup_min_ratio")
        _read_min_ratio(params)
    else:
        _drop_start(params, "warmup_min_lr")
        replaced = _lr_of_optimizer(top) if not params.gives("warmup_max_lr") else None
        trap = f"in place of {replaced}" if replaced else ""
        params.move("warmup_max_lr", NUMBER, LR, convert=float, note=trap, default=_MAX_LR, yields=replaced is None)
    params.move("warmup_num_steps", INTEGER, WARMUP, default=_WARMUP_STEPS)
    shape = params.get("warmup_type", TEXT)
    if shape in ("linear", AUTO):
        params.same("warmup_type", TEXT)
    elif t.now(WARMUP):
        note = "" if params.gives("warmup_type") else "DeepSpeed's default is log; "
        words = f"{note}the learning rate of warm-up grows with the step here (linear), and with its logarithm there"
        t.ignore(params.key("warmup_type"), shape, words)
    if kind == "WarmupLR":
        return
    if not params.gives("total_num_steps"):
        t.refuse(params.key("total_num_steps"), ABSENT, f"is required with {kind}", "give it", unless=DECAY)
    params.move("total_num_steps", INTEGER, DECAY, note="train.num_steps says how long the run is")


def _lr_of_optimizer(top: Fields) -> str | None:
    """The key of a learning rate that the file gives the optimizer: who gives one means one of the file's, and not the
    YAML's, even where DeepSpeed then takes its scheduler's default instead."""
    part = top.peek("optimizer")
    params = part.get("params") if isinstance(part, dict) else None
    if not isinstance(params, dict):
        return None
    given = (name for name in ("lr", "adam_lr") if params.get(name) not in (None, AUTO))
    return next((f"optimizer.params.{name}" for name in given), None)


def _drop_start(params: Fields, name: str) -> None:
    start = params.get(name, NUMBER)
    if start in (0, AUTO):
        params.same(name, NUMBER)
    else:
        params.drop(name, NUMBER, _FROM_ZERO)


def _read_min_ratio(params: Fields) -> None:
    t, lr, ratio = params.translation, params.translation.now(LR), params.get("cos_min_ratio", NUMBER)
    if ratio == AUTO:
        params.keep_ours("cos_min_ratio", MIN_LR)
    elif lr is not None and (ratio is not ABSENT or not params.gives("cos_min_ratio")):
        implied = ratio is ABSENT
        share = _COS_MIN_RATIO if implied else ratio
        note = f"DeepSpeed's default is {share}" if implied else ""
        t.take(params.key("cos_min_ratio"), ratio, {MIN_LR: _without_noise(share * lr)}, note, implied=implied)


def _without_noise(product: float) -> float:
    """0.1 * 3e-4 as 3e-05, and not with the last bit of a rounding."""
    return float(f"{product:.12g}")


def _read_cycle(params: Fields) -> None:
    """One triangle: up in the first steps, down in the second, and then it stays at the lower end."""
    t = params.translation
    for name, ours, note in (("cycle_min_lr", MIN_LR, _FROM_ZERO), ("cycle_max_lr", LR, "")):
        if not params.gives(name):
            t.refuse(params.key(name), ABSENT, "is required with OneCycle", "give it", unless=ours)
        params.move(name, NUMBER, ours, convert=float, note=note)
    params.move("cycle_first_step_size", INTEGER, WARMUP, default=_CYCLE_STEPS)
    first = t.now(WARMUP) or 0
    params.move(
        "cycle_second_step_size",
        INTEGER,
        DECAY,
        convert=lambda second: first + second,
        note="the decay ends after both halves",
        default=first,
    )
    for name in ("cycle_first_stair_count", "cycle_second_stair_count"):
        params.drop(name, INTEGER, "the learning rate changes at each step")
    for name in ("decay_step_size", "decay_lr_rate"):
        params.drop(name, NUMBER, f"after the cycle the learning rate stays at {MIN_LR}")
    cycled = params.get("cycle_momentum", BOOL)
    if cycled is not False:
        note = "optim.beta1 and beta2 stay; DeepSpeed moves the first against the learning rate, the second to 0.99"
        t.ignore(params.key("cycle_momentum"), cycled, note)
    else:
        params.same("cycle_momentum", BOOL)
    for name in ("cycle_min_mom", "cycle_max_mom", "decay_mom_rate"):
        params.drop(name, NUMBER, "optim.beta1 stays")
