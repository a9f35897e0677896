"""Layouts as text, and the lists of them that a proof goes through."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from megatron_lite.config.load import with_world
from megatron_lite.config.parallel import schedule_rule
from megatron_lite.config.problems import ConfigError
from megatron_lite.config.schedules import SCHEDULE_RULES
from megatron_lite.config.schema import RunConfig
from megatron_lite.pipeline.prove import prove_run

MAX_RANKS = 8
RECOMPUTES = ("none", "selective", "full")
ZERO_STAGES = (0, 1, 2, 3)
REDUCE_POLICIES = ("step", "microbatch")
_SIZES = {"tp": "tp", "pp": "pp", "v": "virtual_stages", "dp": "dp", "group": "zero_group"}
EXAMPLE = "tp=2,pp=2,dp=2,sp,gpipe,zero=0"


@dataclass(frozen=True, order=True)
class ProofLayout:
    """One way to run the same computation. ``str()`` gives the text that ``parse`` reads.

    schedule: a name, or the path of a schedule file. recompute: of all stages, or of each with '+' between them.
    zero_group: 0 stands for dp. gather_policy: says something at ZeRO stage 3 only.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    schedule: str = "1f1b"
    zero_stage: int = 1
    sequence_parallel: bool = False
    virtual_stages: int = 1
    recompute: str = "none"
    zero_group: int = 0
    gather_policy: str = "regather"
    reduce_policy: str = "step"

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def num_chunks(self) -> int:
        """The fewest layers that a model needs for this layout."""
        return self.pp * self.virtual_stages

    def __str__(self) -> str:
        rule = schedule_rule(self.schedule)
        _, most = rule.virtual_stages
        says_v = self.virtual_stages != rule.default_virtual_stages or 1 < self.virtual_stages != most
        sizes = {name: getattr(self, size) for name, size in _SIZES.items()}
        says = {"v": says_v, "group": self.zero_group > 0}
        parts = [f"{name}={size}" for name, size in sizes.items() if says.get(name, size > 1)]
        parts += ["sp"] * self.sequence_parallel
        parts += [self.schedule] * (self.schedule != "1f1b") + [f"zero={self.zero_stage}"] * (self.zero_stage != 1)
        parts += ["keep"] * (self.gather_policy == "keep")
        parts += [f"reduce={self.reduce_policy}"] * (self.reduce_policy != "step")
        parts += [f"recompute={self.recompute}"] * (self.recompute != "none")
        return ",".join(parts) or "single"

    def base(self) -> ProofLayout:
        """The layout that this one must equal bit by bit: schedule, number of stages and of chunks, ZeRO stage, when
        parameters are gathered, and recompute change nothing. Where gradients of ranks are added, and in groups of how
        many, changes the order of additions."""
        return ProofLayout(
            tp=self.tp,
            dp=self.dp,
            sequence_parallel=self.sequence_parallel,
            zero_group=self.zero_group,
            reduce_policy=self.reduce_policy,
        )

    def single_axes(self) -> Iterator[tuple[str, ProofLayout]]:
        """Each axis of this layout alone, to find the one that breaks a bound."""
        one = ProofLayout(
            zero_stage=self.zero_stage, gather_policy=self.gather_policy, reduce_policy=self.reduce_policy
        )
        if self.tp > 1:
            yield "tp", dataclasses.replace(one, tp=self.tp, sequence_parallel=self.sequence_parallel)
        if self.num_chunks > 1:
            yield "pp", dataclasses.replace(self, tp=1, dp=1, zero_group=0, sequence_parallel=False, recompute="none")
        if self.dp > 1:
            yield "dp", dataclasses.replace(one, dp=self.dp, zero_group=self.zero_group)
        if self.recompute != "none":
            yield "recompute", dataclasses.replace(one, recompute=max(self.recompute.split("+"), key=RECOMPUTES.index))

    def apply(self, config: RunConfig) -> RunConfig:
        """The config in this layout. Raises ConfigError where the model or the batch does not allow it."""
        update: dict[str, Any] = dataclasses.asdict(self)
        update["recompute"] = tuple(self.recompute.split("+"))
        update["zero_group"] = self.zero_group or None
        if self.zero_stage < 3:
            update["gather_policy"] = "auto"
        if "full" not in update["recompute"]:
            update["recompute_layers"] = 1
        stage_layers = config.parallel.stage_layers
        if stage_layers is not None and len(stage_layers) != self.num_chunks:
            update["stage_layers"] = None
        parallel = config.parallel.model_copy(update=update)
        return with_world(config.model_copy(update={"parallel": parallel}), self.world_size)


def parse(text: str) -> ProofLayout:
    """Reads ``tp=2,pp=2,v=2,dp=2,sp,interleaved,zero=0,recompute=full``; ``single`` is one process.

    Sizes that are left out are 1, v (virtual stages) is what the schedule usually has, and group (of the dp ranks that
    share slices) is dp. ``zero=3,keep``: parameters stay whole for a step. ``zero=2,reduce=microbatch``: gradients are
    summed over dp in each microbatch. recompute may list the stages: ``recompute=none+full``.
    Raises ValueError with what was not understood.
    """
    fields: dict[str, Any] = {}
    for part in text.replace(" ", "").split(","):
        name, value = _field(part, text)
        if name in fields or (fields and not name):
            raise ValueError(f"layout {text!r}: {part!r} contradicts what comes before it")
        if name:
            fields[name] = value
    schedule = fields.get("schedule", ProofLayout.schedule)
    rule = schedule_rule(schedule)
    chunks = fields.setdefault("virtual_stages", rule.default_virtual_stages)
    if not rule.takes(chunks):
        usual = rule.default_virtual_stages
        raise ValueError(f"layout {text!r}: v={chunks} is not what {schedule} takes; leave it out for v={usual}")
    if "gather_policy" in fields and fields.get("zero_stage") != 3:
        raise ValueError(f"layout {text!r}: keep concerns zero=3; leave it out, or add zero=3")
    if "zero_group" in fields and fields.get("zero_stage") == 0:
        raise ValueError(f"layout {text!r}: group concerns zero=1 to zero=3; leave it out, or zero=0")
    if fields.get("zero_group") == fields.get("dp", 1):
        del fields["zero_group"]
    layout = ProofLayout(**fields)
    if layout.world_size > MAX_RANKS:
        raise ValueError(f"layout {text!r} needs {layout.world_size} processes; a proof runs at most {MAX_RANKS}")
    return layout


def _field(part: str, text: str) -> tuple[str, Any]:
    """The field of a layout that a part of its text sets, and the value; no field for 'single'."""
    key, _, value = part.partition("=")
    if key in _SIZES and value.isdecimal() and int(value) > 0:
        return _SIZES[key], int(value)
    if part in SCHEDULE_RULES or part.endswith(".csv"):
        return "schedule", part
    if key == "zero" and value in map(str, ZERO_STAGES):
        return "zero_stage", int(value)
    if part == "keep":
        return "gather_policy", part
    if key == "reduce" and value in REDUCE_POLICIES:
        return "reduce_policy", value
    if part == "sp":
        return "sequence_parallel", True
    if key == "recompute" and all(entry in RECOMPUTES for entry in value.split("+")):
        return "recompute", value
    if part == "single":
        return "", None
    raise ValueError(
        f"layout {text!r}: {part!r} is not understood; --layouts takes {WORDS}, or layouts such as {EXAMPLE} (tp, pp, "
        f"dp, v, group: sizes, v of the virtual stages, group of the dp ranks that share slices; sp: sequence "
        f"parallel; a schedule: {', '.join(SCHEDULE_RULES)}; zero=0 to zero=3, the last with keep or without; "
        f"reduce=step or microbatch; recompute=none, selective or full)"
    )


def layout_of_config(config: RunConfig) -> ProofLayout | None:
    """The config's own layout, or None where it needs more processes than a proof runs."""
    p = config.parallel
    model = p.tp * p.pp
    if model > MAX_RANKS:
        return None
    dp = min(p.dp or MAX_RANKS // model, MAX_RANKS // model)
    recompute = p.recompute[:1] if len(set(p.recompute)) == 1 else p.recompute
    group = p.zero_group or dp
    return ProofLayout(
        p.tp,
        p.pp,
        dp,
        p.schedule,
        p.zero_stage,
        p.sequence_parallel and p.tp > 1,
        p.virtual_stages,
        "+".join(recompute),
        0 if group == dp or dp % group else group,
        "keep" if p.zero_stage == 3 and p.gather_policy == "keep" else "regather",
        p.reduce_policy,
    )


def matrix(sizes: Iterable[int] = (1, 2, 4)) -> list[ProofLayout]:
    """The cross product of everything that a layout can be, at most 8 ranks, without those that say the same twice."""
    sizes = tuple(sizes)
    layouts = []
    for tp, pp, dp in product(sizes, repeat=3):
        for schedule, zero, sp in product(("1f1b", "gpipe"), ZERO_STAGES, (False, True)):
            says_nothing_new = (pp == 1 and schedule == "gpipe") or (dp == 1 and zero != 1) or (tp == 1 and sp)
            if tp * pp * dp <= MAX_RANKS and not says_nothing_new:
                layouts.append(ProofLayout(tp, pp, dp, schedule, zero, sp))
    return layouts


def pipeline_matrix(sizes: Iterable[int] = (2, 4, 8)) -> list[ProofLayout]:
    """Every schedule with one and two virtual stages where it takes them, at each number of stages, ZeRO stage 0 and
    1 and recompute; over two data-parallel ranks where there is room for them, which is what a ZeRO stage is about.
    The other ZeRO stages with every schedule are in `zero_matrix`."""
    layouts = []
    for pp, schedule, chunks, zero, recompute in product(sizes, SCHEDULE_RULES, (1, 2), (0, 1), RECOMPUTES):
        dp = 2 if 2 * pp <= MAX_RANKS else 1
        if SCHEDULE_RULES[schedule].takes(chunks):
            layouts.append(ProofLayout(1, pp, dp, schedule, zero, False, chunks, recompute))
    return layouts


def zero_policies() -> list[ProofLayout]:
    """Every ZeRO stage with every policy that it takes, on one process."""
    return [
        ProofLayout(zero_stage=stage, gather_policy=gather, reduce_policy=reduce)
        for stage, reduce in product(ZERO_STAGES, REDUCE_POLICIES)
        for gather in (("regather", "keep") if stage == 3 else ("regather",))
    ]


def zero_matrix(schedules: Iterable[str] = ("1f1b", "interleaved", "zb-h1", "zb-v")) -> list[ProofLayout]:
    """Every ZeRO stage and policy: over dp alone, whole and in groups; under these schedules, with recompute and
    without, with one and two virtual stages where they take them; and with every other axis."""
    layouts = []
    for one in zero_policies():
        groups = ((2, 0), (4, 0), (4, 2)) if one.zero_stage > 0 else ((2, 0), (4, 0))
        layouts += [dataclasses.replace(one, dp=dp, zero_group=group) for dp, group in groups]
        layouts.append(dataclasses.replace(one, tp=2, dp=2, sequence_parallel=True))
        layouts.append(dataclasses.replace(one, tp=2, pp=2, dp=2, sequence_parallel=True))
        for schedule, chunks, recompute in product(schedules, (1, 2), RECOMPUTES):
            if SCHEDULE_RULES[schedule].takes(chunks):
                layouts.append(
                    dataclasses.replace(one, pp=2, dp=2, schedule=schedule, virtual_stages=chunks, recompute=recompute)
                )
    return layouts


MATRICES: dict[str, Callable[[], list[ProofLayout]]] = {"all": matrix, "pipeline": pipeline_matrix, "zero": zero_matrix}
WORDS = ", ".join(f"'{name}'" for name in ("default", *MATRICES))  # what --layouts takes beside layouts


def default_layouts(config: RunConfig) -> list[ProofLayout]:
    """The config's own layout, each axis alone, and pairs of axes; those that the config allows."""
    own = layout_of_config(config)
    wanted = [own] if own is not None else []
    texts = ("tp=2", "tp=2,sp", "pp=2", "pp=2,gpipe", "dp=2", "dp=2,zero=0", "tp=2,pp=2", "pp=2,dp=2", "tp=2,dp=2,sp",
             "tp=2,pp=2,dp=2,sp", "tp=2,pp=2,dp=2,gpipe,zero=0", "tp=4,sp", "pp=4",
             "pp=2,zb-h1", "pp=2,v=2,interleaved", "pp=2,zb-v", "pp=2,recompute=full",
             "dp=2,zero=2", "dp=4,group=2,zero=3", "pp=2,dp=2,zb-h1,zero=3,keep")  # fmt: skip
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


def choose_layouts(wanted: str, config: RunConfig) -> list[ProofLayout]:
    """The layouts that a text asks for: 'default', 'all' (the whole matrix), 'pipeline' (every pipeline schedule with
    recompute), 'zero' (every ZeRO stage and policy), or layouts with ';' between them.

    Of a matrix, those that the config allows. Raises ValueError for a text that is not understood, ConfigError for a
    named layout that the config does not allow, ScheduleError for one whose schedule is not right.
    """
    if wanted == "default":
        return default_layouts(config)
    chosen = layouts_asked_for(wanted)
    if wanted in MATRICES:
        return legal(config, chosen)
    for layout in chosen:
        prove_run(layout.apply(config))
    return chosen


def layouts_asked_for(wanted: str) -> list[ProofLayout]:
    """The same before the config is looked at; none for 'default', which depends on it."""
    if wanted == "default":
        return []
    if wanted in MATRICES:
        return MATRICES[wanted]()
    chosen = [parse(text) for text in wanted.split(";") if text.strip()]
    if not chosen:
        raise ValueError(f"--layouts names no layout; write {WORDS}, or layouts such as 'tp=2,pp=2;dp=4'")
    return list(dict.fromkeys(chosen))
