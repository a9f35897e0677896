"""From the object in a DeepSpeed config to overrides of our keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_lite.config.deepspeed.batch import read_batch
from megatron_lite.config.deepspeed.optimizer import read_optimizer
from megatron_lite.config.deepspeed.precision import read_grad_dtype, read_precision
from megatron_lite.config.deepspeed.reasons import CHANGES, SECTIONS, TOP
from megatron_lite.config.deepspeed.scheduler import read_scheduler
from megatron_lite.config.deepspeed.translation import Fields, Ours, Translation
from megatron_lite.config.deepspeed.zero import read_zero
from megatron_lite.config.problems import ABSENT

CLIP = "optim.clip_grad_norm"
ALWAYS_ON = ("sparse_attention",)
"""Objects without a key "enabled"."""


def translate(document: Mapping[str, Any], ours: Ours, name: str) -> Translation:
    """What becomes of each key of a DeepSpeed config; name: what errors call the file.

    Raises nothing: what is refused is in ``problems``.
    """
    t = Translation(ours, name)
    top = Fields(t, "", document)
    read_batch(top)
    read_precision(top)
    read_grad_dtype(top)
    read_zero(top)
    read_optimizer(top)
    read_scheduler(top)
    _read_clipping(top)
    _read_reduction(top)
    for section, reason in SECTIONS.items():
        if section not in CHANGES:
            part = top.inside(section)
            if part is not None:
                part.all_ignored(reason)
    for section, rule in CHANGES.items():
        _read_change(top, section, rule)
    top.rest(TOP, strict=False)
    return t


def _read_clipping(top: Fields) -> None:
    t = top.translation
    top.move("gradient_clipping", "a number", CLIP, convert=float)
    if not top.gives("gradient_clipping") and t.now(CLIP):
        t.keep("gradient_clipping", ABSENT, f"DeepSpeed does not clip without it; {CLIP}={t.now(CLIP)} stays")


def _read_reduction(top: Fields) -> None:
    kind = top.get("gradient_allreduce_op", "text")
    if kind not in (ABSENT, "auto", "mean"):
        rule = "must be mean: a gradient is that of the mean loss over the whole batch"
        top.translation.refuse("gradient_allreduce_op", kind, rule, "use mean, and scale optim.lr")
    else:
        top.same("gradient_allreduce_op", "text")


def _read_change(top: Fields, section: str, rule: str) -> None:
    part = top.inside(section)
    if part is None:
        return
    on = list(_enabled(part.key(""), top.peek(section)))
    if section in ALWAYS_ON or on:
        top.translation.refuse(section, top.peek(section), rule, "leave it out, or disable it")
    else:
        part.all_ignored("not enabled")


def _enabled(path: str, value: Any) -> Iterator[str]:
    """The keys "enabled" inside an object that are true."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name == "enabled" and inner is True:
                yield path
            yield from _enabled(f"{path}{name}.", inner)
