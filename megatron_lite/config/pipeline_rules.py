"""Rules of the pipeline: what a schedule asks of stages, chunks and microbatches, how layers are split, recompute."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.layout_rules import even_stages, filling, most_stages
from megatron_lite.config.nearest import Rule, around, fixes, readable
from megatron_lite.config.parallel import schedule_rule
from megatron_lite.config.problems import Fix, Problem, override
from megatron_lite.config.schedules import SCHEDULE_RULES
from megatron_lite.config.values import Values

# One chunk a rank, and backwards that are not split.
STASHING_SCHEDULES = ("1f1b", "eager-1f1b", "gpipe")


def _other_schedules(v: Values, chunks: int) -> Iterator[Fix]:
    """The nearest other schedule that takes this number of chunks a rank.

    The nearest is of the same family (zb-h1 for zb-v), else 1F1B or, with virtual stages, its interleaved form.
    """
    family = v["parallel.schedule"].partition("-")[0]
    taking = [name for name, rule in SCHEDULE_RULES.items() if name != v["parallel.schedule"] and rule.takes(chunks)]
    taking.sort(key=lambda name: (name.partition("-")[0] != family, name not in ("1f1b", "interleaved")))
    yield from ((override("parallel.schedule", name),) for name in taking[:1])


def schedule_takes_virtual_stages(v: Values) -> Iterator[Problem]:
    schedule, chunks, key = v["parallel.schedule"], v["parallel.virtual_stages"], "parallel.virtual_stages"
    if schedule_rule(schedule).takes(chunks):
        return
    fewest, most = schedule_rule(schedule).virtual_stages
    takes = f"{fewest}" if most == fewest else f"at least {fewest}" if most is None else f"{fewest} to {most}"
    legal = fewest if chunks < fewest or most is None else most
    others = tuple(_other_schedules(v, chunks))
    rule = f"must be {takes} with parallel.schedule = {schedule}"
    yield Problem(key, chunks, rule, "", others + fixes(key, [legal]))


def chunks_have_layers(v: Values) -> Iterator[Problem]:
    pp, chunks, layers = v["parallel.pp"], v["parallel.virtual_stages"], v["model.num_layers"]
    schedule = schedule_rule(v["parallel.schedule"])
    if pp * chunks <= layers or not schedule.takes(chunks):
        return
    fewer = [n for n in range(1, layers // pp + 1) if schedule.takes(n)]
    stages = range(1, (most_stages(v) or 0) + 1)
    alternatives = fixes("parallel.pp", around(pp, filling(v, "pp", stages) or stages))
    if chunks == 1:
        rule = f"must be at most model.num_layers = {layers}: each stage holds at least one layer"
        yield Problem("parallel.pp", pp, rule, "", alternatives)
        return
    rule = (
        f"parallel.pp * parallel.virtual_stages = {pp} * {chunks} = {pp * chunks} must be at most model.num_layers = "
        f"{layers}: each chunk holds at least one layer"
    )
    if fewer:
        alternatives = fixes("parallel.virtual_stages", fewer[-1:]) + alternatives
        yield Problem("parallel.virtual_stages", chunks, rule, "", alternatives)
        return
    if pp <= layers:
        one = (override("parallel.virtual_stages", 1),) if v.given("parallel.virtual_stages") else ()
        alternatives += tuple((*fix, *one) for fix in _other_schedules(v, 1))
    yield Problem("parallel.pp", pp, rule, "", alternatives)


def split_is_said_once(v: Values) -> Iterator[Problem]:
    partition, key = v["parallel.partition"], "parallel.partition"
    if partition != "even" and v["parallel.stage_layers"] is not None:
        rule = "says how layers are split, and parallel.stage_layers says it too"
        yield Problem(key, partition, rule, "", fixes(key, ["even"]) + fixes("parallel.stage_layers", [None]))


def stage_layers_add_up(v: Values) -> Iterator[Problem]:
    given, pp, layers = v["parallel.stage_layers"], v["parallel.pp"], v["model.num_layers"]
    virtual, key = v["parallel.virtual_stages"], "parallel.stage_layers"
    chunks = pp * virtual
    if given is None or chunks > layers or not schedule_rule(v["parallel.schedule"]).takes(virtual):
        return
    broken = []
    if len(given) != chunks:
        number = f"pp = {pp}" if virtual == 1 else f"pp * parallel.virtual_stages = {pp} * {virtual} = {chunks}"
        broken.append(f"must have parallel.{number} entries, has {len(given)}")
    if empty := [str(position) for position, count in enumerate(given) if count < 1]:
        named = ("stage" if virtual == 1 else "chunk") + "s" * (len(empty) > 1) + " " + " and ".join(empty)
        broken.append(f"must have entries of at least 1: {named}, counted from 0, would be empty")
    if sum(given) != layers:
        broken.append(f"must add up to model.num_layers = {layers}, adds up to {sum(given)}")
    if broken:
        legal = [list(even_stages(layers, chunks))]
        yield Problem(key, list(given), "; ".join(broken), "or leave it out for this split", fixes(key, legal))


def recompute_is_for_each_stage(v: Values) -> Iterator[Problem]:
    given, pp, key = v["parallel.recompute"], v["parallel.pp"], "parallel.recompute"
    if len(given) in (1, pp):
        return
    rule = f"must be one for all stages, or a list of parallel.pp = {pp}, one for each; has {len(given)} entries"
    last = given[-1] if given else "none"
    legal: object = given[0] if len(set(given)) == 1 else [*given[:pp], *[last] * (pp - len(given))]
    yield Problem(key, list(given), rule, "", fixes(key, [legal if given else last]))


def saved_layers_need_full_recompute(v: Values) -> Iterator[Problem]:
    every, recompute, key = v["parallel.recompute_layers"], v["parallel.recompute"], "parallel.recompute_layers"
    if every > 1 and "full" not in recompute:
        rule = "concerns full recompute, and parallel.recompute has none"
        yield Problem(key, every, rule, "", fixes("parallel.recompute", ["full"]) + fixes(key, [1]))


def saved_layers_fit(v: Values) -> Iterator[Problem]:
    every, layers, key = v["parallel.recompute_layers"], readable(v, "model.num_layers"), "parallel.recompute_layers"
    if layers is not None and every > layers:
        yield Problem(key, every, f"must be at most model.num_layers = {layers}", "", fixes(key, [layers]))


def stashing_needs_one_chunk(v: Values) -> Iterator[Problem]:
    """What weight stashing asks for; the other rules are `stashing_has_no_tied_weights` and `stashing_cannot_clip`."""
    schedule, key = v["parallel.schedule"], "parallel.schedule"
    if v["parallel.weight_stashing"] and schedule not in STASHING_SCHEDULES:
        rule = "has no asynchronous form, and parallel.weight_stashing is true"
        others = (override(key, "1f1b"), *([override("parallel.virtual_stages", 1)] if _has_chunks(v) else []))
        yield Problem(key, schedule, rule, "", (others, (override("parallel.weight_stashing", False),)))


def _has_chunks(v: Values) -> bool:
    return v.given("parallel.virtual_stages") and v["parallel.virtual_stages"] > 1


def stashing_has_no_tied_weights(v: Values) -> Iterator[Problem]:
    tied, key = v["model.tie_embeddings"], "parallel.weight_stashing"
    if v[key] and tied and v["parallel.pp"] > 1:
        rule = "cannot be with a table that the first and the last stage share: they change it at different times"
        yield Problem(key, True, rule, "", fixes(key, [False]) + fixes("parallel.pp", [1]))


def stashing_cannot_clip(v: Values) -> Iterator[Problem]:
    clip, key = v["optim.clip_grad_norm"], "optim.clip_grad_norm"
    if v["parallel.weight_stashing"] and clip > 0:
        rule = "must be 0 with parallel.weight_stashing: no rank waits for the norm of the whole gradient"
        yield Problem(key, clip, rule, "", fixes(key, [0.0]))


RULES: tuple[Rule, ...] = (
    schedule_takes_virtual_stages,
    chunks_have_layers,
    split_is_said_once,
    stage_layers_add_up,
    recompute_is_for_each_stage,
    saved_layers_need_full_recompute,
    saved_layers_fit,
    stashing_needs_one_chunk,
    stashing_has_no_tied_weights,
    stashing_cannot_clip,
)
