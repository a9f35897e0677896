"""Layouts as text, and the lists of them that a proof goes through."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from megatron_lite.config.load import with_world
from megatron_lite.config.problems import ConfigError
from megatron_lite.config.schema import RunConfig

MAX_RANKS = 8
_SIZES = {"tp", "pp", "dp"}


@dataclass(frozen=True, order=True)
class ProofLayout:
    """One way to run the same computation. ``str()`` gives the text that ``parse`` reads."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    schedule: str = "1f1b"
    zero_stage: int = 1
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        parts = [f"{axis}={getattr(self, axis)}" for axis in ("tp", "pp", "dp") if getattr(self, axis) > 1]
        parts += ["sp"] * self.sequence_parallel
        parts += [self.schedule] * (self.schedule != "1f1b") + [f"zero={self.zero_stage}"] * (self.zero_stage != 1)
        return ",".join(parts) or "single"

    def base(self) -> ProofLayout:
        """The layout that this one must equal bit by bit: schedule, number of stages and ZeRO stage change nothing."""
        return ProofLayout(tp=self.tp, dp=self.dp, sequence_parallel=self.sequence_parallel)

    def single_axes(self) -> Iterator[tuple[str, ProofLayout]]:
        """Each axis of this layout alone, to find the one that breaks a bound."""
        if self.tp > 1:
            yield "tp", dataclasses.replace(self, pp=1, dp=1)
        if self.pp > 1:
            yield "pp", dataclasses.replace(self, tp=1, dp=1, sequence_parallel=False)
        if self.dp > 1:
            yield "dp", dataclasses.replace(self, tp=1, pp=1, sequence_parallel=False)

    def apply(self, config: RunConfig) -> RunConfig:
        """The config in this layout. Raises ConfigError where the model or the batch does not allow it."""
        update: dict[str, Any] = dataclasses.asdict(self)
        stage_layers = config.parallel.stage_layers
        if stage_layers is not None and len(stage_layers) != self.pp:
            update["stage_layers"] = None
        parallel = config.parallel.model_copy(update=update)
        return with_world(config.model_copy(update={"parallel": parallel}), self.world_size)


def parse(text: str) -> ProofLayout:
    """Reads ``tp=2,pp=2,dp=2,sp,gpipe,zero=0``; axes that are left out are 1; ``single`` is one process.

    Raises ValueError with what was not understood.
    """
    fields: dict[str, Any] = {}
    for part in text.replace(" ", "").split(","):
        key, _, value = part.partition("=")
        if key in fields or (fields and part == "single"):
            raise ValueError(f"layout {text!r}: {part!r} contradicts what comes before it")
        if key in _SIZES and value.isdecimal() and int(value) > 0:
            fields[key] = int(value)
        elif part in ("gpipe", "1f1b"):
            fields["schedule"] = part
        elif key == "zero" and value in ("0", "1"):
            fields["zero_stage"] = int(value)
        elif part == "sp":
            fields["sequence_parallel"] = True
        elif part != "single":
            raise ValueError(
                f"layout {text!r}: {part!r} is not understood; a layout is like tp=2,pp=2,dp=2,sp,gpipe,zero=0 "
                "(tp, pp, dp: sizes; sp: sequence parallel; gpipe or 1f1b; zero=0 or zero=1)"
            )
    layout = ProofLayout(**fields)
    if layout.world_size > MAX_RANKS:
        raise ValueError(f"layout {text!r} needs {layout.world_size} processes; a proof runs at most {MAX_RANKS}")
    return layout


def layout_of_config(config: RunConfig) -> ProofLayout | None:
    """The config's own layout, or None where it needs more processes than a proof runs."""
    p = config.parallel
    model = p.tp * p.pp
    if model > MAX_RANKS:
        return None
    dp = min(p.dp or MAX_RANKS // model, MAX_RANKS // model)
    return ProofLayout(p.tp, p.pp, dp, p.schedule, p.zero_stage, p.sequence_parallel and p.tp > 1)


def matrix(sizes: Iterable[int] = (1, 2, 4)) -> list[ProofLayout]:
    """The cross product of everything that a layout can be, at most 8 ranks, without those that say the same twice."""
    sizes = tuple(sizes)
    layouts = []
    for tp, pp, dp in product(sizes, repeat=3):
        for schedule, zero, sp in product(("1f1b", "gpipe"), (0, 1), (False, True)):
            says_nothing_new = (pp == 1 and schedule == "gpipe") or (dp == 1 and zero == 0) or (tp == 1 and sp)
            if tp * pp * dp <= MAX_RANKS and not says_nothing_new:
                layouts.append(ProofLayout(tp, pp, dp, schedule, zero, sp))
    return layouts


def default_layouts(config: RunConfig) -> list[ProofLayout]:
    """The config's own layout, each axis alone, and pairs of axes; those that the config allows."""
    own = layout_of_config(config)
    wanted = [own] if own is not None else []
    texts = ("tp=2", "tp=2,sp", "pp=2", "pp=2,gpipe", "dp=2", "dp=2,zero=0", "tp=2,pp=2", "pp=2,dp=2", "tp=2,dp=2,sp",
             "tp=2,pp=2,dp=2,sp", "tp=2,pp=2,dp=2,gpipe,zero=0", "tp=4,sp", "pp=4")  # fmt: skip
    wanted += [parse(text) for text in texts]
    return legal(config, dict.fromkeys(wanted))


def legal(config: RunConfig, layouts: Iterable[ProofLayout]) -> list[ProofLayout]:
    """Those layouts that the config's model and batch allow."""
    allowed = []
    for layout in layouts:
        try:
            layout.apply(config)
        except ConfigError:
            continue
        allowed.append(layout)
    return allowed
