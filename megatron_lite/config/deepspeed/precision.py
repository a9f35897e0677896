"""fp16, bf16, and what gradients are added up in."""

from __future__ import annotations

from math import log2
from typing import Any

from megatron_lite.config.deepspeed.translation import AUTO, Fields
from megatron_lite.config.loss_scale import LARGEST_SCALE
from megatron_lite.config.problems import ABSENT

NEVER = 2**31 - 1
"""Steps after which a static loss scale would grow: more than any run has."""

BOOL, INTEGER, NUMBER, TEXT = "true or false", "an integer", "a number", "text"
PRECISION, GRAD_DTYPE = "train.precision", "train.grad_dtype"

_MASTER = "master weights, and the optimizer's state, are fp32 here"
_FP16 = {
    "auto_cast": "the inputs are token ids, which nothing casts",
    "fp16_master_weights_and_grads": _MASTER,
}
_BF16 = {
    "immediate_grad_update": "gradients are added to the sum in train.grad_dtype as they come, always",
    "check_grad_overflow": "no step is skipped in bf16: a loss that is not finite ends the run with a message",
    "bf16_master_weights_and_grads": _MASTER + "; train.stochastic_rounding=true does without master weights",
    "bf16_optimizer_states": _MASTER,
}


def read_precision(top: Fields) -> None:
    """Takes train.precision and the keys of loss_scale."""
    t = top.translation
    fp16 = top.inside("fp16")
    # "bfloat16" is the older name; DeepSpeed reads it where there is no "bf16"
    name = "bf16" if top.gives("bf16") else "bfloat16"
    bf16 = top.inside(name)
    if name == "bf16":
        top.drop("bfloat16", "an object", "DeepSpeed reads bf16 where both are given")
    wanted = {which: part.get("enabled", BOOL) for which, part in (("fp16", fp16), ("bf16", bf16)) if part}
    on = [which for which, enabled in wanted.items() if enabled is True]
    parts = {"fp16": "fp16", "bf16": name}
    if len(on) == 2:
        t.refuse("fp16.enabled", True, f"and {name}.enabled cannot both be true", "set one of them to false")
    elif on:
        t.take(f"{parts[on[0]]}.enabled", True, {PRECISION: on[0]})
    for which, enabled in wanted.items():
        key = f"{parts[which]}.enabled"
        if enabled == AUTO:
            top.translation.keep(key, AUTO, f"auto: train.precision={t.now(PRECISION)} stays")
        elif enabled is False or (enabled is ABSENT and len(wanted) == 1 and not on):
            _disabled(top, key, enabled, others=bool(on) or AUTO in wanted.values())
    if not wanted and t.now(PRECISION) != "fp32":
        note = f"without fp16 and bf16 DeepSpeed computes in fp32; {PRECISION}={t.now(PRECISION)} stays"
        t.keep("bf16.enabled", ABSENT, note)
    if fp16:
        _read_loss_scale(fp16)
        fp16.rest(_FP16, strict=True)
    if bf16:
        bf16.rest(_BF16, strict=True)


def _disabled(top: Fields, key: str, value: Any, *, others: bool) -> None:
    t = top.translation
    which = "fp16" if key.startswith("fp16") else "bf16"
    if others:
        t.ignore(key, value, f"the other one says what is computed in: {PRECISION}={t.now(PRECISION)}")
    elif PRECISION in t.values:
        t.ignore(key, value, f"as {t.sources[PRECISION]}, which is false too")
    else:
        t.take(key, value, {PRECISION: "fp32"}, f"DeepSpeed computes in fp32 without {which}", implied=value is ABSENT)


def _read_loss_scale(fp16: Fields) -> None:
    t = fp16.translation
    names = ("loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale")
    if t.now(PRECISION) != "fp16":
        for name in (*names, "consecutive_hysteresis"):
            kind = BOOL if name.startswith("consecutive") else NUMBER if name == "loss_scale" else INTEGER
            fp16.drop(name, kind, f"{PRECISION}={t.now(PRECISION)} has no loss scale")
        return
    static = fp16.get("loss_scale", NUMBER)
    if static is not ABSENT and static != AUTO and static < 0:
        t.refuse("fp16.loss_scale", static, "must be 0 (dynamic) or positive (static)")
    elif static is not ABSENT and static != AUTO and static > 0:
        keys = {"initial": float(static), "minimum": float(static), "growth_interval": NEVER}
        note = "static: it starts there, cannot fall below, and never grows; a step with an overflow is skipped"
        t.take("fp16.loss_scale", static, {f"loss_scale.{key}": value for key, value in keys.items()}, note)
        for name in names[1:]:
            fp16.drop(name, INTEGER, "the loss scale is static")
        fp16.drop("consecutive_hysteresis", BOOL, "the loss scale is static")
        return
    elif static == AUTO:
        fp16.keep_ours("loss_scale", "loss_scale.initial")
    elif static is not ABSENT:
        t.take("fp16.loss_scale", static, {}, "dynamic, as it always is here")
    power = fp16.get("initial_scale_power", INTEGER)
    most = log2(LARGEST_SCALE)
    bounded = min(max(power, -most), most) if isinstance(power, int) else 0.0
    note = _bounded(power, bounded, bounded)
    fp16.move("initial_scale_power", INTEGER, "loss_scale.initial", convert=lambda _: 2.0**bounded, note=note)
    fp16.move("loss_scale_window", INTEGER, "loss_scale.growth_interval")
    fp16.move("hysteresis", INTEGER, "loss_scale.hysteresis")
    note = "an overflow at the smallest scale ends DeepSpeed's run; here loss_scale.max_skips overflows in a row do"
    least = fp16.get("min_loss_scale", INTEGER)
    scale = min(max(least, 1 / LARGEST_SCALE), LARGEST_SCALE) if isinstance(least, int) else 1.0
    notes = "; ".join(filter(None, (_bounded(least, scale, log2(scale)), note)))
    fp16.move("min_loss_scale", INTEGER, "loss_scale.minimum", convert=lambda _: float(scale), note=notes)
    if fp16.get("consecutive_hysteresis", BOOL) is True:
        t.ignore("fp16.consecutive_hysteresis", True, "hysteresis counts anew when the scale grows, not at each step")
    else:
        fp16.same("consecutive_hysteresis", BOOL)


def _bounded(given: Any, taken: float, power: float) -> str:
    """What is said of a value that is moved into the bounds of our scale, 2 to a power; nothing of one that is not."""
    if not isinstance(given, int) or given == taken:
        return ""
    which = "smallest" if given < taken else "largest"
    return f"2^{power:g}, the {which} scale here: it and its reciprocal have to be numbers of fp32"


_DTYPES = {"fp32": "fp32", "float32": "fp32", "float": "fp32", "torch.float32": "fp32"} | {
    name: short
    for short, names in {
        "bf16": ("bf16", "bfloat16", "torch.bfloat16"),
        "fp16": ("fp16", "float16", "half", "torch.float16"),
    }.items()
    for name in names
}


def read_grad_dtype(top: Fields) -> None:
    """Takes train.grad_dtype, in which gradients are both added up and reduced here; after `read_precision`."""
    t = top.translation
    types = top.inside("data_types")
    accumulated = types.get("grad_accum_dtype", TEXT) if types else ABSENT
    if types:
        if accumulated is not ABSENT:
            _take_grad_dtype(top, "data_types.grad_accum_dtype", accumulated)
        types.rest(
            {"param_dtype": f"{PRECISION} says it", "buffer_dtype": "buffers have the dtype that their use asks for"},
            strict=False,
        )
    reduced = top.get("communication_data_type", TEXT)
    if reduced is not ABSENT and accumulated is not ABSENT:
        t.ignore(
            "communication_data_type", reduced, f"gradients are reduced in what they are added up in, {GRAD_DTYPE}"
        )
    elif reduced is not ABSENT:
        _take_grad_dtype(top, "communication_data_type", reduced)
    elif accumulated is ABSENT and t.now(PRECISION) in ("bf16", "fp16") and t.now(GRAD_DTYPE) == "fp32":
        note = f"DeepSpeed adds gradients up in {t.now(PRECISION)}; {GRAD_DTYPE}=fp32 stays, and takes twice the bytes"
        t.keep("data_types.grad_accum_dtype", ABSENT, note)


def _take_grad_dtype(top: Fields, key: str, value: Any) -> None:
    t, precision = top.translation, top.translation.now(PRECISION)
    dtype = _DTYPES.get(value)
    if value == AUTO:
        t.keep(key, value, f"auto: {GRAD_DTYPE}={t.now(GRAD_DTYPE)} stays")
    elif dtype is None:
        t.refuse(key, value, "must be fp32, bf16 or fp16", unless=GRAD_DTYPE)
    elif precision not in ("bf16", "fp16"):
        t.ignore(key, value, f"{PRECISION}={precision} has one dtype for all")
    elif dtype in ("fp32", precision):
        t.take(key, value, {GRAD_DTYPE: "fp32" if dtype == "fp32" else "param"})
    else:
        fixes = ((f"{GRAD_DTYPE}=fp32",), (f"{GRAD_DTYPE}=param",))
        t.refuse(key, value, f"must be fp32, or {precision} as {PRECISION}", "", fixes, unless=GRAD_DTYPE)
