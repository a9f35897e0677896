"""optimizer: which one, and its settings. What `params` leaves out has the default of DeepSpeed's optimizer."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from megatron_lite.config.deepspeed.scheduler import lr_from_scheduler
from megatron_lite.config.deepspeed.translation import Fields, Translation
from megatron_lite.config.problems import ABSENT, override

BOOL, NUMBER, TEXT, PAIR = "true or false", "a number", "text", "two numbers"
NAME, LR, WEIGHT_DECAY = "optim.name", "optim.lr", "optim.weight_decay"

TYPES: Mapping[str, str] = {
    "Adam": "adamw",
    "AdamW": "adamw",
    "Lion": "lion",
    "Muon": "muon",
    "SGD": "sgd",
    "Adafactor": "adafactor",
}
"""DeepSpeed's type (any case) -> optim.name."""

LACKING: Mapping[str, str] = {
    "Adagrad": "",
    "Lamb": "",
    "OneBitAdam": "AdamW with compressed communication, which needs ZeRO stage 0 there",
    "ZeroOneAdam": "AdamW with compressed communication, which needs ZeRO stage 0 there",
    "OneBitLamb": "",
    "MuAdam": "",
    "MuAdamW": "",
    "MuSGD": "",
}
"""Types that DeepSpeed has and this program has not, with what is near."""

# lr, weight_decay, betas and eps of DeepSpeed's classes: FusedAdam, DeepSpeedCPUAdam, FusedLion, MuonWithAuxAdam (for
# what it updates with Adam), and torch's SGD and Adafactor
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "adamw": {"lr": 1e-3, "weight_decay": 0.0, "betas": [0.9, 0.999], "eps": 1e-8},
    "lion": {"lr": 1e-3, "weight_decay": 0.0, "betas": [0.9, 0.999]},
    "muon": {"lr": 3e-4, "weight_decay": 0.0, "betas": [0.9, 0.95], "eps": 1e-10, "momentum": 0.95},
    "sgd": {"lr": 1e-3, "weight_decay": 0.0, "momentum": 0.0},
    "adafactor": {"lr": 1e-2, "weight_decay": 0.0},
}
_TORCH_ADAMW_WEIGHT_DECAY = 0.01

_IGNORED = {
    "torch_adam": "one implementation a device, which kernels.adamw chooses",
    "set_grad_none": "gradients live in flat buckets",
    "fp32_optimizer_states": "the optimizer's state is fp32 here",
    "fused": "one implementation a device, which kernels.adamw chooses",
    "foreach": "one implementation a device, which kernels.adamw chooses",
    "capturable": "no graph of the step is captured",
    "differentiable": "nothing differentiates through a step",
    "ns_method": "optim.newton_schulz_steps and optim.newton_schulz_dtype say how a matrix is orthogonalised",
    "d": "PaLM's settings (arXiv:2204.02311, section 5)",
}
_NO_DECAY = "not on norms and biases here, and on all parameters of a group there"


def read_optimizer(top: Fields) -> None:
    """Takes optim.name, lr, weight_decay, beta1, beta2, eps, momentum and nesterov."""
    t = top.translation
    part = top.inside("optimizer")
    if part is None:
        return
    kind = part.get("type", TEXT)
    params = part.inside("params")
    name = _take_type(t, kind)
    if params is None and name is not None:
        params = Fields(t, "optimizer.params", {})
    if params is not None and name is None:
        params.all_ignored("there is no optimizer" if kind is ABSENT else "a setting of another optimizer")
    elif params is not None and name is not None:
        _read_params(top, params, str(kind).lower(), name)
    note = "DeepSpeed reads it in optimizer.params alone"
    part.rest({"legacy_fusion": "one implementation a device", "adam_w_mode": note, "torch_adam": note}, strict=False)


def _take_type(t: Translation, kind: Any) -> str | None:
    """Our name of the optimizer whose settings are to be read, or None."""
    key = "optimizer.type"
    if kind is ABSENT:
        t.ignore(key, ABSENT, "without a type DeepSpeed makes no optimizer")
        return None
    known = {name.lower(): ours for name, ours in TYPES.items()}
    name = known.get(kind.lower())
    if name is None:
        _refuse_type(t, key, kind)
        return None
    same = kind.lower() == "adam"
    t.take(key, kind, {NAME: name}, "DeepSpeed's Adam is AdamW, unless adam_w_mode is false" if same else "")
    return name if t.now(NAME) == name else None


def _refuse_type(t: Translation, key: str, kind: str) -> None:
    lacking = {name.lower(): words for name, words in LACKING.items()}
    known = kind.lower() in lacking
    near = difflib.get_close_matches(kind.lower(), {name.lower(): None for name in (*TYPES, *LACKING)}, n=1)
    rule = "is an optimizer that this program has not" if known else "is no optimizer of DeepSpeed's that is known here"
    words = lacking.get(kind.lower())
    rule += f" ({words})" if words else ""
    spelled = next((name for name in (*TYPES, *LACKING) if near and name.lower() == near[0]), "")
    remedy = f"there are {', '.join(TYPES)} (optim.name: {', '.join(dict.fromkeys(TYPES.values()))})"
    if not known and spelled:
        remedy = f"did you mean {spelled}? {remedy}"
    t.refuse(key, kind, rule, remedy, ((override(NAME, "adamw"),),), unless=NAME)


def _read_params(top: Fields, params: Fields, kind: str, name: str) -> None:
    defaults = dict(_DEFAULTS[name])
    if kind == "adamw" and params.get("torch_adam", BOOL) is True:
        defaults["weight_decay"] = _TORCH_ADAMW_WEIGHT_DECAY
    _read_lr(top, params, name, defaults["lr"])
    params.move("weight_decay", NUMBER, WEIGHT_DECAY, convert=float, note=_NO_DECAY, default=defaults["weight_decay"])
    if "betas" in defaults:
        _read_betas(params, defaults["betas"])
    if "eps" in defaults:
        params.move("eps", NUMBER, "optim.eps", convert=float, default=defaults["eps"])
    if "momentum" in defaults:
        params.move("momentum", NUMBER, "optim.momentum", convert=float, default=defaults["momentum"])
    {"adamw": _read_adam, "sgd": _read_sgd, "adafactor": _read_adafactor}.get(name, _nothing_more)(params, kind)
    _refuse_true(params, "amsgrad", "asks for the largest second moment so far, which this program does not keep")
    _refuse_true(params, "maximize", "asks for ascent, and a loss is made smaller here")
    params.drop("torch_adam", BOOL, _IGNORED["torch_adam"])
    if params.get("max_grad_norm", NUMBER) is not ABSENT:
        rule = "is refused by DeepSpeed too"
        params.translation.refuse(
            params.key("max_grad_norm"), params.get("max_grad_norm", NUMBER), rule, "gradient_clipping says it"
        )
    params.rest(_IGNORED, strict=True)


def _read_lr(top: Fields, params: Fields, name: str, default: float) -> None:
    setter = lr_from_scheduler(top)
    names = ("adam_lr", "lr") if name == "muon" else ("lr",)
    source = next((key for key in names if params.gives(key)), "lr")
    if setter:
        params.drop("lr", NUMBER, f"{setter} sets the learning rate in its place")
    for other in names:
        if other != source:
            params.drop(other, NUMBER, f"{params.key(source)} is the learning rate")
    if name == "muon":
        note = "one learning rate here: the update of a matrix has the size of AdamW's (arXiv:2502.16982)"
        params.drop("muon_lr", NUMBER, note)
        if setter:
            params.drop("adam_lr", NUMBER, f"{setter} sets the learning rate in its place")
    if not setter:
        params.move(source, NUMBER, LR, convert=float, default=default)


def _read_betas(params: Fields, default: list[float]) -> None:
    t, betas = params.translation, params.get("betas", PAIR)
    both = ("optim.beta1", "optim.beta2")
    if betas == "auto":
        params.keep_ours("betas", *both)
    elif betas is not ABSENT:
        t.take(params.key("betas"), betas, dict(zip(both, map(float, betas), strict=True)))
    elif not params.gives("betas"):
        note = f"DeepSpeed's default is {default}"
        t.take(params.key("betas"), ABSENT, dict(zip(both, default, strict=True)), note, implied=True)


def _nothing_more(params: Fields, kind: str) -> None:
    """Lion and Muon have no settings beside the common ones."""


def _read_adam(params: Fields, kind: str) -> None:
    t, key, mode = params.translation, params.key("adam_w_mode"), params.get("adam_w_mode", BOOL)
    if params.get("bias_correction", BOOL) is False:
        t.refuse(params.key("bias_correction"), False, "must be true: the means are corrected for their start here")
    else:
        params.same("bias_correction", BOOL)
    if mode is not False:
        params.same("adam_w_mode", BOOL)
    elif kind == "adamw":
        t.ignore(key, mode, "with type AdamW DeepSpeed ignores it too")
    elif not t.now(WEIGHT_DECAY):
        t.ignore(key, mode, "without weight decay Adam and AdamW are the same")
    else:
        rule = "adds weight decay to the gradient (L2), and this program has the decoupled kind (AdamW) alone"
        fixes = ((override(WEIGHT_DECAY, 0.0),), (override(WEIGHT_DECAY, t.now(WEIGHT_DECAY)),))
        remedy = "with 0.0 the two are the same; with a value of the command line it is decoupled"
        t.refuse(key, mode, rule, remedy, fixes, unless=WEIGHT_DECAY)


def _read_sgd(params: Fields, kind: str) -> None:
    t = params.translation
    params.move("nesterov", BOOL, "optim.nesterov", default=False)
    dampening = params.get("dampening", NUMBER)
    if dampening not in (ABSENT, "auto") and dampening:
        t.refuse(params.key("dampening"), dampening, "must be 0: a gradient enters the momentum whole here")
    else:
        params.same("dampening", NUMBER)
    if t.now(WEIGHT_DECAY) and t.now("optim.momentum"):
        rule = "goes through the momentum in torch's SGD (L2), and is decoupled from it here"
        fixes = ((override(WEIGHT_DECAY, 0.0),),)
        decay = t.now(WEIGHT_DECAY)
        t.refuse(params.key("weight_decay"), decay, rule, "", fixes, unless=WEIGHT_DECAY)


def _read_adafactor(params: Fields, kind: str) -> None:
    t, decay = params.translation, params.get("beta2_decay", NUMBER)
    t.ignore("optimizer.type", kind, "PaLM's Adafactor here: not factored, and with momentum (arXiv:2204.02311)")
    if decay not in (ABSENT, "auto") and decay != -0.8:
        t.refuse(params.key("beta2_decay"), decay, "must be -0.8: the second moment decays by 1 - step^-0.8 here")
    else:
        params.same("beta2_decay", NUMBER)
    params.drop("eps", PAIR, "optim.eps says it: arXiv:1804.04235, section 8")


def _refuse_true(params: Fields, name: str, rule: str) -> None:
    if params.get(name, BOOL) is True:
        params.translation.refuse(params.key(name), True, rule, "leave it out")
    else:
        params.same(name, BOOL)
